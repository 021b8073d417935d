"""Parts objects that touch: where two good shapes explain a blob better than one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from .appearance import GREY, hues, shapes
from .scenes import COLOURS
from .segmentation import SPECK, Objects, components, coverage, erode

DOUBTFUL = 0.80  # overlap with the best single shape below which a split is tried
BETTER = 0.06  # by how much the parts must fit their shapes better than the whole fits one
FITS = 0.70  # the least overlap of every part


def part(images: Float[np.ndarray, "b 64 64 3"], objects: Objects) -> Objects:
    """The same objects, with blobs of two or more objects split, by colour first or at their narrowest place."""
    whole = shapes(objects.cover).max(1) if len(objects.owner) else np.zeros(0)
    masks, owner, changed = [], [], False
    for k, mask in enumerate(objects.mask):
        parts = _best(images[objects.owner[k]], mask, objects.contrast[objects.owner[k]], whole[k])
        changed |= len(parts) > 1
        masks += parts
        owner += [objects.owner[k]] * len(parts)
    if not changed:
        return objects
    stack, owners = np.stack(masks), np.array(owner, int)
    return replace(objects, owner=owners, mask=stack, cover=coverage(stack, owners, objects.contrast))


def _best(image: np.ndarray, mask: np.ndarray, contrast: np.ndarray, whole: float) -> list[np.ndarray]:
    best, found = whole + BETTER, [mask]
    if whole >= DOUBTFUL or mask.sum() < 5 * SPECK:
        return found
    for seeds in (_by_colour(image, mask), *_by_erosion(mask)):
        if len(seeds) < 2:
            continue
        far = np.stack([np.asarray(ndimage.distance_transform_edt(~seed)) for seed in seeds])
        parts = [mask & (far.argmin(0) == k) for k in range(len(seeds))]
        area = np.array([p.sum() for p in parts])
        fit = shapes(coverage(np.stack(parts), np.zeros(len(parts), int), contrast[None])).max(1)
        score = float((fit * area).sum() / area.sum())
        if score > best and fit.min() >= FITS and area.min() >= 2 * SPECK:
            best, found = score, parts
    return found


def _by_colour(image: np.ndarray, mask: Bool[np.ndarray, "h w"]) -> list[np.ndarray]:
    hue, chroma = hues(image)
    name = np.abs((hue[..., None] - np.array(list(COLOURS.values())) + 180) % 360 - 180).argmin(-1)
    seeds = []
    for k in range(len(COLOURS)):
        seed, total = components(erode((mask & (name == k) & (chroma > GREY))[None]))
        size = np.bincount(seed.ravel(), minlength=total + 1)
        seeds += [seed[0] == j for j in range(1, total + 1) if size[j] >= SPECK]
    return seeds


def _by_erosion(mask: Bool[np.ndarray, "h w"]) -> list[list[np.ndarray]]:
    found = []
    core = mask[None]
    for _ in range(5):
        core = erode(core)
        seed, total = components(core)
        size = np.bincount(seed.ravel(), minlength=total + 1)
        seeds = [seed[0] == j for j in range(1, total + 1) if size[j] >= 4]
        if len(seeds) > 1:
            found.append(seeds)
    return found
