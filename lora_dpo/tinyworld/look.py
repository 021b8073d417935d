"""How a picture looks, whatever its caption: shading, outline, vividness and crispness, from its pixels alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from .appearance import inside
from .render import LIGHT
from .segmentation import Objects, dilate, erode, together

SLOPE, CAST = 0.56, 0.17  # of the renderer: brightness per radius along the light, and depth of the shadow
LIT = 0.75  # of the brightest nearby; darker pixels belong to a stripe, a dot or an outline rather than to shading
RIM = 0.72  # an outline is darker than this, relative to the inside
MUTED, VIVID = 0.62, 0.96  # saturation of plain object pixels at vividness 0 and 1
SHARP, SOFT = 0.70, 0.22  # the steepest step at an edge, relative to all of it: clean, and blurred by 2 pixels
NOISE = 0.03  # deviation of the background at which crispness has fallen to 1/e


@dataclass(frozen=True)
class Look:
    """The look of a batch of pictures; NaN in every field where a picture has no object.

    Attributes:
        shading: 0 for flat and outlined pictures, about 1 for the renderer's shaded ones: half from brightness that
            falls along the light's direction, half from a shadow below right of the objects. Continuous; may be a
            little below 0 or above 1.
        outline: 0 no outline … 1 an outline as dark as the renderer's, from the brightness of the objects' rims.
        vividness: the renderer's parameter, 0 muted … 1 vivid, from the saturation of the objects' inside.
        crispness: 1 for sharp edges and a clean background, towards 0 with blur or noise.
    """

    shading: Float[np.ndarray, " b"]
    outline: Float[np.ndarray, " b"]
    vividness: Float[np.ndarray, " b"]
    crispness: Float[np.ndarray, " b"]

    def style(self, k: int) -> str:
        """ "shaded", "outlined" or "flat": the renderer's style that picture k looks most like."""
        return "shaded" if self.shading[k] > 0.45 else "outlined" if self.outline[k] > 0.5 else "flat"


def look(
    images: Float[np.ndarray, "b h w 3"],
    objects: Objects,
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    radius: Float[np.ndarray, " n"],
) -> Look:
    """Measures the look of pictures whose objects are known, averaged over each picture's objects (by area).

    Args:
        images: RGB in [0, 1].
        x, y, radius: of each object, in pixels.
    """
    owner, mask = objects.owner, objects.mask
    count = len(images)
    area = mask.sum((1, 2)).astype(float)

    def per_picture(values: np.ndarray, weight: np.ndarray = area) -> np.ndarray:
        total = np.bincount(owner, weight, minlength=count)
        with np.errstate(invalid="ignore"):
            return np.bincount(owner, values * weight, minlength=count) / np.where(total > 0, total, np.nan)

    core = inside(mask)
    bright, peak = images.mean(-1)[owner], images.max(-1)[owner]
    axis, scale = np.arange(mask.shape[-1]) + 0.5, np.maximum(radius, 1)[:, None]  # along: -1 in shade … 1 in light
    right, down = (axis - x[:, None]) / scale * LIGHT[0], (axis - y[:, None]) / scale * LIGHT[1]
    along = (down[:, :, None] + right[:, None, :]).astype(np.float32)
    top = images.max(-1)
    lit = (top > LIT * ndimage.maximum_filter(top, (1, 5, 5)))[owner]
    slope = _slope(along, bright, core & lit)
    rim = erode(mask)
    rim &= ~erode(rim)
    dark = 1 - _mean(peak, rim) / np.maximum(_mean(peak, core), 1e-3)
    shading = 0.5 * per_picture(slope) / SLOPE + 0.5 * _shadow(objects, count) / CAST
    return Look(
        shading=shading,
        outline=np.clip(per_picture(dark) / (2 * (1 - RIM)), 0, 1),
        vividness=np.clip((per_picture(_saturation(images, objects, core, along)) - MUTED) / (VIVID - MUTED), 0, 1),
        crispness=np.clip((_steepness(images, objects) - SOFT) / (SHARP - SOFT), 0, 1)
        * np.exp(-_unrest(images, objects) / NOISE),
    )


def _mean(values: np.ndarray, where: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, " n"]:
    return np.einsum("nyx,nyx->n", values, where.astype(values.dtype)) / np.maximum(where.sum((1, 2)), 1)


def _slope(along: np.ndarray, bright: np.ndarray, core: np.ndarray) -> Float[np.ndarray, " n"]:
    """Least-squares slope of brightness, relative to its mean, along the light's direction."""
    mean, middle = _mean(bright, core), _mean(along, core)
    off = (along - middle[:, None, None]) * core
    return np.einsum("nyx,nyx->n", off, bright) / np.maximum(np.einsum("nyx,nyx->n", off, off) * mean, 1e-6)


def _shadow(objects: Objects, count: int) -> Float[np.ndarray, " b"]:
    """How much darker the background is below right of the objects than above left: blur's halo cancels."""
    any_ = together(objects.mask, objects.owner, count)
    free = ~dilate(any_)
    depth = np.clip(1 - objects.light, -0.2, 0.5)
    below, above = np.zeros_like(any_), np.zeros_like(any_)
    below[:, 3:, 2:] = any_[:, :-3, :-2]
    above[:, :-3, :-2] = any_[:, 3:, 2:]
    return _mean(depth, below & free) - _mean(depth, above & free)


def _saturation(images: np.ndarray, objects: Objects, core: np.ndarray, along: np.ndarray) -> Float[np.ndarray, " n"]:
    """Median saturation of the half away from the light, which the highlight doesn't wash out."""
    away = core & (along < 0)
    found = np.zeros(len(objects.owner))
    for k, owner in enumerate(objects.owner):
        pixels = images[owner][away[k] if away[k].any() else objects.mask[k]]
        peak = pixels.max(-1)
        found[k] = np.median((peak - pixels.min(-1)) / np.maximum(peak, 0.05))
    return found


def _steepness(images: np.ndarray, objects: Objects) -> Float[np.ndarray, " b"]:
    """The steepest step between neighbours near the objects' edges, relative to all change within 2 pixels."""
    body = together(objects.mask, objects.owner, len(images))
    edge = body & ~erode(body)
    spread = ndimage.maximum_filter(images, (1, 5, 5, 1)) - ndimage.minimum_filter(images, (1, 5, 5, 1))
    step = np.zeros(body.shape, images.dtype)
    for axis in (1, 2):
        change = np.linalg.norm(np.diff(images, axis=axis), axis=-1)
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        for side in (tuple(before), tuple(after)):
            step[side] = np.maximum(step[side], change)
    steepest = ndimage.maximum_filter(step, (1, 3, 3)) / np.maximum(np.linalg.norm(spread, axis=-1), 0.1)
    return _mean(steepest, edge)


def _unrest(images: np.ndarray, objects: Objects) -> Float[np.ndarray, " b"]:
    """Deviation between neighbouring pixels of the background, away from objects and shadows; 0 in a clean picture."""
    near = together(objects.mask, objects.owner, len(images))
    for _ in range(4):
        near = dilate(near)
    far = ~near & (objects.light > 0.93)
    both = far[:, :, 1:] & far[:, :, :-1]
    change = images[:, :, 1:] - images[:, :, :-1]
    step = np.einsum("byxc,byxc->byx", change, change) / 3
    return np.sqrt(_mean(step, both) / 2) + _mean(objects.contrast, far) / 2
