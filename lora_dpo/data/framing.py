"""From whole pictures to training pictures: how large, and which part of them.

A picture is scaled until it just covers its size, and what then sticks out is cut off. Both happen in one resampling
(Pillow's bicubic filter, antialiased: its support grows with the reduction), from a box with fractional edges, so that
neither side is stretched and nothing is rounded before the pixels are. Only the part that is kept is resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from typing import Literal

from PIL import Image

from lora_dpo import buckets
from lora_dpo.buckets import Size
from lora_dpo.errors import UserError

Crop = Literal["center", "top"]
TOO_SMALL = "picture too small"


@dataclass(frozen=True)
class Framing:
    """The resize and crop policy of a run.

    Attributes:
        resolution: pixels; the side of the square, and what the buckets are made from (see `buckets.sizes`).
        aspect: "square": every picture becomes a square; "buckets": both pictures of a pair become the bucket that is
            nearest to the two.
        bucket_step, max_aspect: see `buckets.sizes`.
        crop: the part that is kept: the middle, or of a picture that is too tall its top.
        small_images: what happens to a pair with a picture that would have to be enlarged.
    """

    resolution: int
    aspect: Literal["square", "buckets"] = "square"
    bucket_step: int = 64
    max_aspect: float = 2.0
    crop: Crop = "center"
    small_images: Literal["enlarge", "drop"] = "enlarge"

    @cached_property
    def sizes(self) -> list[Size]:
        """Those that a picture may become."""
        if self.aspect == "square":
            return [(self.resolution, self.resolution)]
        return buckets.sizes(self.resolution, self.bucket_step, self.max_aspect)

    @property
    def looks(self) -> bool:
        """Whether anything depends on the pictures' own sizes."""
        return len(self.sizes) > 1 or self.small_images == "drop"

    def size_for(self, pictures: tuple[Size, ...]) -> Size:
        """The size of both pictures of a pair, from their own."""
        return _nearest(pictures, tuple(self.sizes)) if len(self.sizes) > 1 else self.sizes[0]

    def drops(self, pictures: Sequence[Size], size: Size) -> bool:
        """Whether a pair of these pictures is left out."""
        return self.small_images == "drop" and any(h < size[0] or w < size[1] for h, w in pictures)

    def settings(self) -> tuple[object, ...]:
        """What decides which pairs there are, and the size of each."""
        plain = Framing(self.resolution)
        return (self.resolution,) if self == plain else astuple(self)

    def require(self, latent_scale: int, multiple: int) -> None:
        """UserError if the model can't take these sizes.

        Args:
            latent_scale: pixels per latent cell.
            multiple: of whose multiples the sides of a bucket have to be, so that the denoiser halves them evenly.
        """
        if self.resolution <= 0 or self.resolution % latent_scale:
            raise UserError(f"resolution has to be a positive multiple of {latent_scale}, got {self.resolution}")
        if self.aspect == "square":
            return
        if self.bucket_step <= 0 or self.bucket_step % multiple:
            raise UserError(
                f"this model takes buckets in steps of {multiple} pixels, got {self.bucket_step}",
                "data.bucket_step_pixels",
                f"give a multiple of {multiple}",
            )
        if self.resolution % self.bucket_step or self.max_aspect < 1:
            raise UserError(
                f"no buckets of {self.resolution} pixels in steps of {self.bucket_step} up to {self.max_aspect:g}:1",
                "data.bucket_step_pixels",
                "the step has to divide data.resolution, and data.max_aspect to be at least 1",
            )


def frame(image: Image.Image, size: Size, crop: Crop) -> tuple[Image.Image, tuple[int, int]]:
    """The picture at this size, and (top, left) of the crop in pixels of the scaled picture.

    The latter is what SDXL is conditioned on: it was trained on pictures that were scaled first and cropped then
    [SDXL, sec. 2.2].
    """
    (width, height), (rows, columns) = image.size, size
    # Whole numbers are compared, so that the box lies within the picture however its edges are rounded.
    if rows * width >= columns * height:
        box_height, box_width, scale = float(height), columns * height / rows, rows / height
    else:
        box_height, box_width, scale = rows * width / columns, float(width), columns / width
    left = (width - box_width) / 2
    top = (height - box_height) / 2 if crop == "center" else 0.0
    framed = image.resize(
        (columns, rows), Image.Resampling.BICUBIC, box=(left, top, left + box_width, top + box_height)
    )
    return framed, (round(top * scale), round(left * scale))


@lru_cache(maxsize=4096)
def _nearest(pictures: tuple[Size, ...], sizes: tuple[Size, ...]) -> Size:
    return buckets.nearest(pictures, sizes)
