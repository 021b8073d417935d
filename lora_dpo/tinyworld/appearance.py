"""Reads single objects: which shape, colour and texture a segmented object has, from its pixels alone."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from .render import field, outline
from .scenes import COLOURS, SHAPES, SIZE
from .segmentation import erode

CELLS = 32  # resolution of the normalised masks
TURNS = np.linspace(-0.36, 0.36, 7)  # radians; the renderer turns by 0.12 at most
STRETCHES = (0.84, 0.92, 1.0, 1.09, 1.19)  # width over height; the renderer doesn't stretch
RECOGNISED = 0.74  # overlap with the best template from which on an object has that shape
ROUGHLY, LEAD = 0.66, 0.08  # or from this overlap on, if it leads the second best by this much
OWN_COLOUR = 0.60  # the share of an object's colour that one name must have
ROUGH, ROUGH_EDGES = 0.10, 0.030  # log-brightness: deviation and squared diagonal steps of the faintest texture
ONE_WAY = 0.5  # coherence above which a texture runs in one direction
BETWEEN = 8  # degrees around the middle between two colour names where either will do
GREY = 0.13  # chroma (largest minus smallest of RGB) below which a pixel has no colour


@functools.cache
def areas() -> dict[str, float]:
    """The area of each shape in squared radii (shoelace formula)."""
    points = {shape: outline(shape) for shape in SHAPES}
    following = {shape: np.roll(p, -1, 0) for shape, p in points.items()}
    return {
        s: float(abs((p[:, 0] * following[s][:, 1] - following[s][:, 0] * p[:, 1]).sum()) / 2)
        for s, p in points.items()
    }


def centres(cover: Float[np.ndarray, "n h w"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centroid x, y and area of soft masks, in pixels."""
    axis = np.arange(cover.shape[-1]) + 0.5
    area = np.maximum(cover.sum((1, 2)), 1e-6)
    return cover.sum(1) @ axis / area, cover.sum(2) @ axis / area, area


def normalised(cover: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n cells"]:
    """Soft masks around their centroid, scaled to a common area."""
    x, y, area = centres(cover)
    grid = np.linspace(-1, 1, CELLS)
    size = cover.shape[-1]
    u = np.clip(x[:, None] + grid * np.sqrt(area)[:, None] - 0.5, -1, size)  # one empty pixel around the picture
    v = np.clip(y[:, None] + grid * np.sqrt(area)[:, None] - 0.5, -1, size)
    padded = np.pad(np.asarray(cover, np.float32), ((0, 0), (1, 2), (1, 2)))
    j, i = np.floor(u).astype(int) + 1, np.floor(v).astype(int) + 1
    fu, fv = (u + 1 - j)[:, None, :], (v + 1 - i)[:, :, None]
    n = np.arange(len(cover))[:, None, None]
    i, j = i[:, :, None], j[:, None, :]
    top = padded[n, i, j] * (1 - fu) + padded[n, i, j + 1] * fu
    bottom = padded[n, i + 1, j] * (1 - fu) + padded[n, i + 1, j + 1] * fu
    return (top * (1 - fv) + bottom * fv).reshape(len(cover), CELLS * CELLS)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape, turned and stretched: masks [templates, cells] and the index of each one's shape."""
    masks, names = [], []
    axis = (np.arange(96) + 0.5 - 48) / 22
    for index, shape in enumerate(SHAPES):
        grid = field(shape)
        reach, last = 2.6, len(grid) - 1
        for turn in TURNS:
            for stretch in STRETCHES:
                x, y = np.meshgrid(axis / np.sqrt(stretch), axis * np.sqrt(stretch))
                c, s = np.cos(turn), np.sin(turn)
                u, v = ((k + reach) / (2 * reach) * last for k in (c * x + s * y, -s * x + c * y))
                inside = grid[np.rint(np.clip(v, 0, last)).astype(int), np.rint(np.clip(u, 0, last)).astype(int)]
                masks.append(np.clip(0.5 - inside * 10, 0, 1))
                names.append(index)
    return normalised(np.stack(masks)), np.array(names)


def shapes(cover: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n shapes"]:
    """Overlap (intersection over union of soft masks, 0 … 1) with each shape's best template, in SHAPES' order."""
    templates, names = _templates()
    found = normalised(cover)
    # One by one: a product of matrices rounds differently with the number of objects in the batch.
    both = np.stack([templates @ one for one in found]) if len(found) else np.zeros((0, len(templates)))
    overlap = both / (((found**2).sum(1)[:, None] + (templates**2).sum(1)) - both)
    return np.stack([overlap[:, names == k].max(1) for k in range(len(SHAPES))], 1)


def names(fits: Float[np.ndarray, "n shapes"]) -> list[str | None]:
    """The name of each object's shape, from its overlaps; None where it is like no shape, or like several."""
    order = np.sort(fits, 1)
    known = (order[:, -1] >= RECOGNISED) | ((order[:, -1] >= ROUGHLY) & (order[:, -1] - order[:, -2] >= LEAD))
    return [SHAPES[k] if sure else None for k, sure in zip(fits.argmax(1), known, strict=True)]


def hues(pixels: Float[np.ndarray, "*any 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees (at most 1.2 from the hexagonal hue of HSV) and chroma (largest minus smallest of RGB)."""
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    angle = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return angle, pixels.max(-1) - pixels.min(-1)


def colours(
    images: Float[np.ndarray, "b h w 3"], owner: Int[np.ndarray, " n"], inner: Bool[np.ndarray, "n h w"]
) -> list[str | None]:
    """The name of each object's colour: the nearest one to most of its inner pixels, weighted by chroma.

    None where that name suits less than `OWN_COLOUR` of the object (grey pixels suit none). A pixel suits a name up to
    `BETWEEN` degrees beyond the middle to the next name: people argue there whether it is, say, red or orange, and an
    object whose hue lies on a border has one colour, not two.
    """
    n, y, x = np.nonzero(inner)
    hue, chroma = hues(images[owner[n], y, x])
    away = np.abs((hue[:, None] - np.array(list(COLOURS.values())) + 180) % 360 - 180)
    coloured = np.where(chroma > GREY, chroma, 0)
    nearest, suits = np.zeros((2, len(owner), len(COLOURS)))
    np.add.at(nearest, (n, away.argmin(1)), coloured)
    near = coloured[:, None] * (away - away.min(1)[:, None] < 2 * BETWEEN)
    for k in range(len(COLOURS)):
        suits[:, k] = np.bincount(n, near[:, k], minlength=len(owner))
    total = np.maximum(np.bincount(n, np.maximum(chroma, 0.02), minlength=len(owner)), 1e-9)
    names, best = list(COLOURS), nearest.argmax(1)
    share = suits[np.arange(len(owner)), best] / total
    return [names[k] if part >= OWN_COLOUR else None for k, part in zip(best, share, strict=True)]


def texture(image: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> str | None:
    """ "striped", "dotted", or None for a plain surface.

    Brightness inside the object is freed of smooth shading (a fitted quadratic); what remains varies strongly where
    there is a texture, and in one direction only (coherence of the structure tensor) where that texture is stripes.
    """
    y, x = np.nonzero(mask)
    if len(x) < 12:
        return None
    value = np.log(np.maximum(image[y, x].max(-1), 0.05))
    u, v = (x - x.mean()) / SIZE, (y - y.mean()) / SIZE
    smooth = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], 1)
    rest = np.zeros(mask.shape)
    rest[y, x] = value - smooth @ np.linalg.lstsq(smooth, value, rcond=None)[0]
    whole = mask[:-1, :-1] & mask[1:, 1:] & mask[1:, :-1] & mask[:-1, 1:]
    if not whole.any():
        return None
    down, up = (rest[:-1, :-1] - rest[1:, 1:])[whole], (rest[:-1, 1:] - rest[1:, :-1])[whole]
    a, b, ab = (down**2).mean(), (up**2).mean(), (down * up).mean()
    if rest[y, x].std() < ROUGH or a + b < ROUGH_EDGES:
        return None
    return "striped" if np.hypot(a - b, 2 * ab) / (a + b) > ONE_WAY else "dotted"


def inside(masks: Bool[np.ndarray, "n h w"], least: int = 40) -> Bool[np.ndarray, "n h w"]:
    """Masks without edge and outline: three pixels less all around, fewer where less than `least` would remain."""
    one = erode(masks)
    two = erode(one)
    three = erode(two)

    def size(m: np.ndarray) -> np.ndarray:
        return m.sum((1, 2))[:, None, None]

    shallow = np.where(size(two) >= 12, two, np.where(size(one) >= 6, one, masks))
    return np.where(size(three) >= least, three, shallow)
