"""Finds the objects of a picture from its pixels alone: what stands out from the background, shadows left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from .scenes import SIZE

STANDS_OUT = 0.12  # in units of RGB: what a muted object differs from its background by, even where it is half covered
SHADOW = 0.60  # the darkest a cast shadow makes its background (the renderer's is 0.70 and overlaps little)
SPECK = 12  # pixels; anything smaller isn't an object
SPECK_SHARE = 0.04  # of the largest object's area; anything smaller isn't an object either
HOLE = 40  # pixels; smaller holes are highlights or light dots, larger ones are background seen through a ring
FAINT = 0.17  # an object whose pixels stand out less than this on average is a smear
IN_PLANE = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3])  # four neighbours, same picture


@dataclass(frozen=True)
class Objects:
    """The objects of a batch of pictures, in one stack.

    Attributes:
        owner: which picture each object belongs to, ascending.
        mask: the pixels of each object, its small holes filled.
        cover: how much of each pixel an object covers, 0 … 1: soft at the edge, 1 inside.
        background: RGB of each picture's background.
        light: each pixel's brightness along its background's colour; 1 = the background itself, less in a shadow.
        contrast: how far each pixel is from the background and its shadows.
    """

    owner: Int[np.ndarray, " n"]
    mask: Bool[np.ndarray, "n h w"]
    cover: Float[np.ndarray, "n h w"]
    background: Float[np.ndarray, "b 3"]
    light: Float[np.ndarray, "b h w"]
    contrast: Float[np.ndarray, "b h w"]


def separate(images: Float[np.ndarray, "b 64 64 3"]) -> Objects:
    """Splits pictures into background and objects.

    A pixel p is written as k·b + r with b the background's colour and r orthogonal to it. A shadow has r ≈ 0 and
    k down to `SHADOW`; a coloured object has a large r, an outline or a dark stripe a small k.

    Args:
        images: RGB in [0, 1].
    """
    edge = [images[:, :2], images[:, -2:], images[:, 2:-2, :2].swapaxes(1, 2), images[:, 2:-2, -2:].swapaxes(1, 2)]
    background = np.median(np.concatenate([e.reshape(len(images), -1, 3) for e in edge], 1), 1)
    norm = np.maximum((background**2).sum(-1), 1e-3)
    light = np.einsum("byxc,bc->byx", images, background / norm[:, None])
    rest = images - light[..., None] * background[:, None, None]
    contrast = np.sqrt(np.einsum("byxc,byxc->byx", rest, rest)) + np.maximum(SHADOW - light, 0)
    mask = _fill(contrast > STANDS_OUT)
    labels, total = components(mask)
    area = np.bincount(labels.ravel(), minlength=total + 1)
    strength = np.bincount(labels.ravel(), contrast.ravel(), minlength=total + 1) / np.maximum(area, 1)
    keep = [k for k in range(1, total + 1) if area[k] >= SPECK and strength[k] >= FAINT]
    boxes = ndimage.find_objects(labels)
    owner = np.array([boxes[k - 1][0].start for k in keep], int)
    largest = np.zeros(len(images))
    np.maximum.at(largest, owner, area[keep])
    chosen = area[keep] >= SPECK_SHARE * largest[owner]
    owner, keep = owner[chosen], np.array(keep, int)[chosen]
    masks = labels[owner] == keep[:, None, None]
    return Objects(owner, masks, coverage(masks, owner, contrast), background, light, contrast)


def components(mask: Bool[np.ndarray, "b h w"]) -> tuple[Int[np.ndarray, "b h w"], int]:
    """Numbers the connected regions of all pictures from 1, 0 is outside; and how many regions there are."""
    labels = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, IN_PLANE, output=labels)
    return labels, int(labels.max(initial=0))


def coverage(
    masks: Bool[np.ndarray, "n h w"], owner: Int[np.ndarray, " n"], contrast: Float[np.ndarray, "b h w"]
) -> Float[np.ndarray, "n h w"]:
    """How much of each pixel an object covers: at its edge, the contrast relative to the strongest nearby."""
    relative = np.minimum(contrast / np.maximum(ndimage.maximum_filter(contrast, (1, 5, 5)), STANDS_OUT), 1)
    own = dilate(masks) & ~(together(masks, owner, len(contrast))[owner] & ~masks)
    return np.where(erode(masks), np.float32(1), relative[owner] * own)


def together(
    masks: Bool[np.ndarray, "n h w"], owner: Int[np.ndarray, " n"], count: int
) -> Bool[np.ndarray, "count h w"]:
    """The union of each picture's masks."""
    union = np.zeros((count, *masks.shape[1:]), bool)
    for k, mask in zip(owner, masks, strict=True):
        union[k] |= mask
    return union


def erode(masks: Bool[np.ndarray, "n h w"]) -> Bool[np.ndarray, "n h w"]:
    """Removes one pixel all around; what lies outside the picture counts as outside the object."""
    return ~dilate(~masks, outside=True)


def dilate(masks: Bool[np.ndarray, "n h w"], outside: bool = False) -> Bool[np.ndarray, "n h w"]:
    """Adds one pixel all around (four neighbours)."""
    out = masks.copy()
    out[:, 1:] |= masks[:, :-1]
    out[:, :-1] |= masks[:, 1:]
    out[:, :, 1:] |= masks[:, :, :-1]
    out[:, :, :-1] |= masks[:, :, 1:]
    if outside:
        out[:, 0] = out[:, -1] = True
        out[:, :, 0] = out[:, :, -1] = True
    return out


def _fill(mask: Bool[np.ndarray, "b h w"]) -> Bool[np.ndarray, "b h w"]:
    labels, total = components(~mask)
    size = np.bincount(labels.ravel(), minlength=total + 1)
    open_ = np.zeros(total + 1, bool)
    for side in (labels[:, 0], labels[:, SIZE - 1], labels[:, :, 0], labels[:, :, SIZE - 1]):
        open_[side] = True
    hole = ~open_ & (size < HOLE)
    hole[0] = False
    return mask | hole[labels]
