"""Sizes, the choice among them, and which pixels of a picture are kept."""

from __future__ import annotations

import io
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lora_dpo import buckets
from lora_dpo.data.framing import Framing, frame
from lora_dpo.data.images import decode, upright_size
from lora_dpo.errors import UserError

STEPS = st.sampled_from([8, 16, 32, 64])
ASPECTS = st.floats(1, 6, allow_nan=False)
SIDES = st.integers(1, 6000)
PICTURES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=2)


# Buckets


# Widths and heights of SDXL's own table (appendix I), those that are taller than wide.
OF_SDXL = {
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024),
}  # fmt: skip


@pytest.mark.parametrize("aspect", [1.5, 2.0, 3.0, 4.0])
def test_the_buckets_of_1024_pixels_are_sizes_of_sdxl(aspect):
    made = buckets.sizes(1024, 64, aspect)
    assert len(made) > 6
    assert {(min(size), max(size)) for size in made} <= OF_SDXL


def test_the_documented_buckets():
    text = (Path(__file__).parents[1] / "docs" / "pictures.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| ([\d×, ]+) \|$", text, re.M)
    assert [row[0] for row in rows] == ["512", "768", "1024"]
    for resolution, listed in rows:
        made = buckets.sizes(int(resolution), 64, 2.0)
        assert listed.split(", ") == [buckets.written(size) for size in made if size[0] >= size[1]]


def test_the_documented_crop():
    framed, crop = frame(Image.new("RGB", (1600, 1200)), (896, 1152), "center")
    assert (framed.size, crop) == ((1152, 896), (0, 21))
    assert buckets.nearest([(1200, 1600)], buckets.sizes(1024, 64, 2.0)) == (896, 1152)


@given(st.integers(1, 20), STEPS, ASPECTS)
def test_every_bucket_is_allowed_and_as_large_as_can_be(times, step, aspect):
    resolution = times * step
    made = buckets.sizes(resolution, step, aspect)
    allowed = {
        (h, w)
        for h in range(step, resolution * 7, step)
        for w in range(step, resolution**2 // h + 1, step)
        if max(h, w) <= aspect * min(h, w)
    }
    assert len(set(made)) == len(made)
    assert set(made) == {
        (h, w) for h, w in allowed if not any((a, b) != (h, w) and a >= h and b >= w for a, b in allowed)
    }
    assert (resolution, resolution) in made
    assert made == [(w, h) for h, w in made[::-1]] == sorted(made, reverse=True)


@given(PICTURES, st.integers(1, 20), STEPS, ASPECTS)
def test_the_nearest_bucket_on_a_logarithmic_scale(pictures, times, step, aspect):
    made = buckets.sizes(times * step, step, aspect)
    mean = np.mean([math.log(h / w) for h, w in pictures])
    distances = {size: abs(math.log(size[0] / size[1]) - mean) for size in made}
    chosen = buckets.nearest(pictures, made)
    assert distances[chosen] <= min(distances.values()) + 1e-9
    assert buckets.nearest(pictures[::-1], made[::-1]) == chosen
    turned = buckets.nearest([(w, h) for h, w in pictures], made)
    assert turned == chosen[::-1]


@pytest.mark.parametrize(
    ("pictures", "chosen"),
    [
        ([(1024, 1024)], (1024, 1024)),
        ([(768, 1024)], (896, 1152)),  # 4:3
        ([(1080, 1920)], (768, 1344)),  # 16:9
        ([(3000, 1000)], (1408, 704)),  # beyond 2:1
        ([(512, 1024), (1024, 512)], (1024, 1024)),  # one of each
        ([(512, 512), (512, 1024)], (832, 1216)),  # between 1 and 2 lies √2
        ([(2, 2), (1408, 1408)], (1024, 1024)),  # how large a picture is doesn't matter
    ],
)
def test_a_pair_gets_what_lies_between_its_pictures(pictures, chosen):
    assert buckets.nearest(pictures, buckets.sizes(1024, 64, 2.0)) == chosen


def test_of_two_that_are_equally_near_the_squarer_one():
    assert buckets.nearest([(4, 8)], [(2, 8), (4, 4), (2, 2)]) in ((4, 4), (2, 2))
    assert buckets.nearest([(4, 8)], [(4, 16), (6, 6)]) == (6, 6)
    assert buckets.nearest([(8, 4)], [(16, 4), (6, 6)]) == (6, 6)


# Framings


def test_a_framing_says_what_it_drops():
    keeps, drops = (Framing(64, small_images=what) for what in ("enlarge", "drop"))
    assert not keeps.drops([(10, 10)], (64, 64))
    assert not drops.drops([(64, 64), (70, 64)], (64, 64))
    assert drops.drops([(64, 64), (70, 63)], (64, 64))
    assert (keeps.looks, drops.looks, Framing(64, aspect="buckets", bucket_step=16).looks) == (False, True, True)


@pytest.mark.parametrize(
    ("framing", "said"),
    [
        (Framing(60), "positive multiple of 8"),
        (Framing(0), "positive multiple of 8"),
        (Framing(1024, aspect="buckets", bucket_step=24), "data.bucket_step_pixels: .*in steps of 64"),
        (Framing(1000, aspect="buckets"), "no buckets of 1000"),
        (Framing(1024, aspect="buckets", max_aspect=0.5), "no buckets of 1024"),
    ],
)
def test_sizes_that_a_model_cannot_take(framing, said):
    with pytest.raises(UserError, match=said):
        framing.require(8, 64)


def test_every_choice_but_squares_from_the_middle_has_settings_of_its_own():
    choices = [
        Framing(64),
        Framing(32),
        Framing(64, crop="top"),
        Framing(64, small_images="drop"),
        Framing(64, aspect="buckets"),
        Framing(64, aspect="buckets", bucket_step=16),
        Framing(64, aspect="buckets", max_aspect=3.0),
    ]
    assert len({choice.settings() for choice in choices}) == len(choices)
    assert Framing(64).settings() == (64,)


# Crops

RED, BLUE = (255, 0, 0), (0, 0, 255)


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A blue picture of (height, width) with a red block at (top, left, height, width)."""
    image = Image.new("RGB", size[::-1], BLUE)
    top, left, height, width = box
    image.paste(RED, (left, top, left + width, top + height))
    return image


def block(image: Image.Image) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what is more red than blue."""
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] > pixels[..., 2])
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


@pytest.mark.parametrize(
    ("original", "box", "size", "crop", "where", "kept"),
    [
        # Twice as wide: scaled by 1/2, 50 columns cut on the left.
        ((200, 400), (20, 120, 60, 80), (100, 100), "center", (0, 50), (10, 10, 30, 40)),
        ((200, 400), (20, 120, 60, 80), (100, 100), "top", (0, 50), (10, 10, 30, 40)),
        # Twice as tall: scaled by 1/2, 50 rows cut at the top, or none.
        ((400, 200), (120, 20, 80, 60), (100, 100), "center", (50, 0), (10, 10, 40, 30)),
        ((400, 200), (20, 20, 80, 60), (100, 100), "top", (0, 0), (10, 10, 40, 30)),
        # A wide bucket from a square: scaled by 3/4, half of 60 rows.
        ((160, 160), (80, 40, 40, 80), (60, 120), "center", (30, 0), (30, 30, 30, 60)),
        ((160, 160), (0, 40, 40, 80), (60, 120), "top", (0, 0), (0, 30, 30, 60)),
        # A tall bucket from a wide picture, enlarged twice.
        ((60, 90), (10, 35, 20, 10), (120, 80), "center", (0, 50), (20, 20, 40, 20)),
        # Its own size.
        ((64, 96), (3, 5, 7, 9), (64, 96), "center", (0, 0), (3, 5, 7, 9)),
    ],
)
def test_what_a_crop_keeps_and_where_it_lies(original, box, size, crop, where, kept):
    framed, placed = frame(marked(original, box), size, crop)
    assert framed.size == size[::-1]
    assert placed == where
    assert block(framed) == kept


@given(SIDES, SIDES, st.integers(1, 12), st.integers(1, 12), st.sampled_from(["center", "top"]))
def test_the_crop_of_any_picture_lies_within_it(height, width, rows, columns, crop):
    image = Image.new("RGB", (width, height)) if height * width < 10**6 else Image.new("RGB", (width, 1 + height // 99))
    size = (8 * rows, 8 * columns)
    framed, (top, left) = frame(image, size, crop)
    assert framed.size == size[::-1]
    scale = max(size[0] / image.height, size[1] / image.width)
    beyond = (image.height * scale - size[0], image.width * scale - size[1])
    assert top == pytest.approx(beyond[0] / 2 if crop == "center" else 0, abs=0.51)
    assert left == pytest.approx(beyond[1] / 2, abs=0.51)


def test_reductions_do_not_alias():
    stripes = Image.fromarray(np.tile(np.array([[0], [255]], np.uint8), (128, 256)))
    framed, _ = frame(stripes.convert("RGB"), (32, 32), "center")
    assert np.ptp(np.asarray(framed)) < 30


# Sizes from headers


def encoded(form: str, orientation: int, **options) -> bytes:
    rng = np.random.default_rng(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (40, 24, 3), np.uint8))
    image.save(buffer, form, **({"exif": exif} if orientation else {}), **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def behind_the_pixels(data: bytes, *chunks: bytes) -> bytes:
    end = chunk(b"IEND", b"")
    assert data.endswith(end)
    return data.removesuffix(end) + b"".join(chunks) + end


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
RAW = b"Raw profile type exif\0\nexif\n  26\n" + b"Exif\0\0".hex().encode() + exif_of(6).hex().encode()


def xmp_in_front() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x><tiff:Orientation>8</tiff:Orientation></x>")
    return encoded("PNG", 0, pnginfo=info)


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(form, orientation) for form in ("JPEG", "PNG", "WEBP", "TIFF") for orientation in range(9)),
        *(encoded(form, 0) for form in ("GIF", "BMP")),
        xmp_in_front(),
        *(behind_the_pixels(encoded("PNG", 0), chunk(b"eXIf", exif_of(turn))) for turn in (3, 6)),
        behind_the_pixels(encoded("PNG", 0), chunk(b"iTXt", XMP)),
        behind_the_pixels(encoded("PNG", 0), chunk(b"tEXt", RAW)),
    ],
)
def test_a_header_tells_the_size_of_the_upright_picture(data):
    picture = decode(data, "here")
    assert upright_size(data, "here") == (picture.height, picture.width)


def test_the_turning_marks_do_turn():
    """Else the test above would show nothing of what stands behind the pixels."""
    for data in (
        xmp_in_front(),
        behind_the_pixels(encoded("PNG", 0), chunk(b"eXIf", exif_of(6))),
        behind_the_pixels(encoded("PNG", 0), chunk(b"iTXt", XMP)),
        behind_the_pixels(encoded("PNG", 0), chunk(b"tEXt", RAW)),
        *(encoded(form, 6) for form in ("JPEG", "PNG", "WEBP", "TIFF")),
    ):
        assert upright_size(data, "here") == (24, 40)


def test_an_ordinary_pictures_size_is_had_without_decoding_it(monkeypatch):
    written = PngImagePlugin.PngInfo()
    written.add_text("parameters", "a cat, eXIf, XML:com.adobe.xmp")  # as image generators do
    datas = [encoded("PNG", 0, pnginfo=written), encoded("JPEG", 6), encoded("WEBP", 0)]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert [upright_size(data, "here") for data in datas] == [(40, 24), (24, 40), (40, 24)]


def test_a_size_that_cannot_be_had_says_what_decoding_says():
    with pytest.raises(UserError, match="can't be decoded"):
        upright_size(b"no picture", "row 3")
