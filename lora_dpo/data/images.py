"""Encoded pictures to RGB.

Policy: rotated as EXIF says; grey, CMYK, palette and 16-bit pictures become 8-bit RGB; transparent ones lie on white;
colour profiles are not applied. Refused with a UserError: truncated or unknown files, animations, pictures of more
than `MAX_PIXELS`, and formats outside `FORMATS` (vector formats would start an interpreter).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lora_dpo.errors import UserError

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
MAX_PIXELS = 100_000_000
_TURNING = (b"eXIf", b"tEXtRaw profile type exif", b"zTXtRaw profile type exif", b"iTXtXML:com.adobe.xmp")
_PILLOWS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode(data: bytes, where: str) -> Image.Image:
    """The picture in 8-bit RGB, upright. `where` names it in the UserError that a bad one raises."""
    try:
        _silence_pillow()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"the image has {width}×{height} pixels, more than {MAX_PIXELS:,}", where)
            # A phone's JPEG may be of the kind MPO, which holds the picture first and auxiliary ones after it.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise UserError("the image is animated or has several pages", where, "save one frame of it")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of nearly every kind on damaged bytes.
        raise UserError(f"the image can't be decoded ({type(error).__name__}: {error})", where) from error


def _silence_pillow() -> None:
    """Damaged metadata and large sizes warn; neither is the reader's concern: the size is checked here.

    A filter that stays, as `catch_warnings` swaps the filters of every thread and pictures are decoded in several.
    """
    if _PILLOWS not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOWS[3].pattern)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # `convert` would clip 16-bit values at 255.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) of `decode`'s picture, decoding no more than has to be."""
    with suppress(Exception):  # `decode` says what is wrong, if something is.
        _silence_pillow()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # A PNG may say behind its pixels how it is to be turned. Pillow decodes all of it to find out.
            unturned = image.format == "PNG" and not any(start.startswith(_TURNING) for start in _png_chunks(data))
            if unturned or image.format in ("JPEG", "MPO", "WEBP"):
                width, height = image.size
                turned = not unturned and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (width, height) if turned else (height, width)
    picture = decode(data, where)
    return picture.height, picture.width


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The kind of each chunk and the beginning of its content."""
    place = len(b"\x89PNG\r\n\x1a\n")
    while place + 8 <= len(data):
        yield data[place + 4 : place + 40]
        place += 12 + int.from_bytes(data[place : place + 4])


def to_pixels(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """An RGB picture as float32 in [0, 1]."""
    levels: UInt8[Tensor, "H W 3"] = torch.from_numpy(np.array(image, dtype=np.uint8))
    return levels.permute(2, 0, 1).float() / 255
