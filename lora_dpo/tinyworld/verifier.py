"""Judges pictures of the tiny world from their pixels alone: is what the caption says true, and how do they look?

Nothing is learned: objects are segmented (`segmentation`, `touching`), read one by one (`appearance`), matched with the
items of the caption, and measured for what no caption names (`look`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import UserError
from .appearance import areas, centres, colours, inside, names, shapes, texture
from .look import Look, look
from .scenes import BACKGROUNDS, SIZE, SIZES, Facts, Item, read
from .segmentation import separate
from .touching import part

CATEGORIES = ("shape", "colour", "texture", "size", "count", "relation", "background")
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # pixels; the middle of the gap between small and large radii
RADII = {"single": (9.0, 22.0), "pair": (7.9, 12.9), "relation": (7.9, 12.9), "count": (7.0, 11.5)}  # mean, as rendered
APART, SLANT = 6.0, 0.8  # a relation holds from this many pixels on, and from this share of the other direction
UNDER_RIM = 0.3  # pixels by which an outlined object measures too small: its rim darkens less than evenly at the edge
LIKE = 0.11  # distance of brightness-free RGB up to which a background has its nearest name
CHUNK = 64  # pictures at a time: what a processor's cache holds


@dataclass(frozen=True)
class Seen:
    """An object found in a picture: what it looks like (None = no name fits), where it is and how large, in pixels.

    `overlap` is how well it fits its best shape's template (intersection over union).
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Measurement:
    """What one picture shows, against its caption.

    Attributes:
        facts: for each of `CATEGORIES`, whether what the caption says is true; None where it says nothing.
            An item of the caption that no object shows makes shape and colour false. `count` is asserted by every
            caption: an object too many or too few makes it false.
        objects: what was found, whatever the caption says.
        background: the name of the background, None if it has none of them.
        style: "flat", "outlined" or "shaded".
        style_shading: 0 flat or outlined … 1 as shaded as the renderer's shaded style; may exceed both.
        size: the mean radius on the scale of what the renderer draws for such a caption, 0 smallest … 1 largest;
            below 0 and above 1 for what it doesn't draw.
        vividness: 0 muted … 1 vivid.
        crispness: 1 for sharp edges and a clean background, towards 0 for blur or noise.

    `style_shading`, `size` and `vividness` are NaN and `crispness` is 0 in a picture without objects.
    """

    facts: dict[str, bool | None]
    objects: tuple[Seen, ...]
    background: str | None
    style: str
    style_shading: float
    size: float
    vividness: float
    crispness: float

    @property
    def strict(self) -> bool:
        """Everything the caption says is true, and nothing else is there."""
        return all(fact is not False for fact in self.facts.values())

    @property
    def mean(self) -> float:
        """The share of the categories asserted by the caption that are true: 0 … 1."""
        said = [fact for fact in self.facts.values() if fact is not None]
        return sum(said) / len(said)


def measure(
    images: np.ndarray | Float[Tensor, "b 3 64 64"] | UInt8[Tensor, "b 3 64 64"], captions: Sequence[str]
) -> list[Measurement]:
    """Measures pictures against their captions.

    Args:
        images: floats in [0, 1] or uint8, `[b, 3, 64, 64]` (or `[b, 64, 64, 3]`, as rendered).
        captions: one per picture, in the tiny world's grammar.

    Raises:
        UserError: pictures of another size, a caption outside the grammar, or not one caption per picture.
    """
    pixels = _pixels(images)
    if len(pixels) != len(captions):
        raise UserError(f"{len(pixels)} pictures but {len(captions)} captions", "the tiny world's verifier")
    try:
        said = [read(caption) for caption in captions]
    except ValueError as error:
        hint = "The verifier knows only the tiny world; score other prompts with another scorer."
        raise UserError(str(error), "the tiny world's verifier", hint) from error
    found = []
    for start in range(0, len(pixels), CHUNK):
        found += _measure(np.clip(pixels[start : start + CHUNK], 0, 1), said[start : start + CHUNK])
    return found


def _pixels(images: np.ndarray | Tensor) -> Float[np.ndarray, "b 64 64 3"]:
    if isinstance(images, Tensor):  # numpy has no bfloat16
        images = images.detach().cpu()
        array = images.float().numpy() if images.is_floating_point() else images.numpy()
    else:
        array = images
    if array.ndim == 4 and array.shape[1:] == (3, SIZE, SIZE):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[1:] != (SIZE, SIZE, 3):
        hint = f"It judges pictures of {SIZE}x{SIZE} pixels: sample at that size."
        raise UserError(f"pictures of shape {tuple(array.shape)}", "the tiny world's verifier", hint)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return np.ascontiguousarray(array, np.float32) / np.float32(scale)


def _measure(images: np.ndarray, said: Sequence[Facts]) -> list[Measurement]:
    objects = part(images, separate(images))
    core = inside(objects.mask)
    fits = shapes(objects.cover)
    shape, colour = names(fits), colours(images, objects.owner, core)
    x, y, area = centres(objects.cover)
    unit = np.array([areas()[name] if name else 2.5 for name in shape])  # 2.5: between star and circle
    radius = np.sqrt(area / unit)
    looks = look(images, objects, x, y, radius)
    radius += UNDER_RIM * looks.outline[objects.owner]
    seen: list[list[Seen]] = [[] for _ in images]
    where: list[list[int]] = [[] for _ in images]
    for k, owner in enumerate(objects.owner):
        place = (float(x[k]), float(y[k]), float(radius[k]))
        seen[owner].append(Seen(shape[k], colour[k], *place, overlap=float(fits[k].max())))
        where[owner].append(k)
    found = []
    for i, facts in enumerate(said):
        chosen = _match(facts, seen[i])
        first = chosen[0] if facts.kind == "single" and facts.items[0].texture else None
        shown = None if first is None else texture(images[i], core[where[i][first]])
        background = _background(objects.background[i])
        found.append(_measurement(facts, seen[i], chosen, shown, background, looks, i))
    return found


def _measurement(
    facts: Facts,
    seen: list[Seen],
    chosen: list[int | None],
    shown: str | None,
    background: str | None,
    looks: Look,
    index: int,
) -> Measurement:
    items = facts.items if facts.kind != "count" else facts.items * len(seen)
    pairs = [(item, None if k is None else seen[k]) for item, k in zip(items, chosen, strict=True)]
    first = facts.items[0]
    verdict: dict[str, bool | None] = dict.fromkeys(CATEGORIES)
    verdict["shape"] = bool(pairs) and all(thing is not None and thing.shape == item.shape for item, thing in pairs)
    verdict["colour"] = bool(pairs) and all(thing is not None and thing.colour == item.colour for item, thing in pairs)
    verdict["count"] = len(seen) == facts.count
    if first.texture:
        verdict["texture"] = shown == first.texture
    if first.size:
        thing = pairs[0][1]
        verdict["size"] = thing is not None and ("large" if thing.radius > LARGE else "small") == first.size
    if facts.relation:
        verdict["relation"] = _related(facts, [thing for _, thing in pairs])
    if facts.background:
        verdict["background"] = background == facts.background
    low, high = SIZES[first.size] if first.size else RADII[facts.kind]
    size = (float(np.mean([s.radius for s in seen])) - low) / (high - low) if seen else float("nan")
    return Measurement(
        verdict,
        tuple(seen),
        background,
        looks.style(index),
        float(looks.shading[index]),
        size,
        float(looks.vividness[index]),
        float(looks.crispness[index]) if seen else 0.0,
    )


def holds(relation: str, a: Seen, b: Seen) -> bool:
    """Whether object a is, say, "left of" object b: by their centres, more in that direction than across it."""
    dx, dy = b.x - a.x, b.y - a.y
    ahead, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead >= APART and ahead >= SLANT * abs(across)


def _related(facts: Facts, things: list[Seen | None]) -> bool:
    match (facts.relation, *things):
        case (str() as relation, Seen() as a, Seen() as b):
            return holds(relation, a, b)
    return False


def _match(facts: Facts, seen: list[Seen]) -> list[int | None]:
    """Which object shows each item: the choice under which most is true; shape decides before colour, then area.

    For a `count` caption every object must show the one item.
    """
    if facts.kind == "count":
        return list(range(len(seen)))
    slots: list[int | None] = list(range(len(seen)))
    slots += [None] * max(len(facts.items) - len(seen), 0)

    def worth(choice: tuple[int | None, ...]) -> tuple[int, int, float]:
        things = [None if k is None else seen[k] for k in choice]
        right = [_agreement(item, thing) for item, thing in zip(facts.items, things, strict=True)]
        related = int(_related(facts, things))
        size = sum(thing.radius for thing in things if thing)
        return sum(s + c for s, c in right) * 2 + related, sum(s for s, _ in right), size

    return list(max(itertools.permutations(slots, len(facts.items)), key=worth))


def _agreement(item: Item, thing: Seen | None) -> tuple[int, int]:
    return (0, 0) if thing is None else (int(thing.shape == item.shape), int(thing.colour == item.colour))


def _background(rgb: Float[np.ndarray, " rgb"]) -> str | None:
    """The name of a background's colour: the nearest whatever its brightness; None if dark or strongly coloured."""
    if rgb.max() < 0.75:
        return None
    tint = rgb / rgb.max()
    distance = {name: float(np.linalg.norm(tint - base)) for name, base in _TINTS.items()}
    best = min(distance, key=lambda name: distance[name])
    return best if distance[best] < LIKE else None


def _tint(hue: float, saturation: float) -> np.ndarray:
    fan = np.array([hue / 60 % 6, (hue / 60 - 2) % 6, (hue / 60 - 4) % 6])  # distance of the hue from R, G and B
    return 1 - saturation * np.clip(np.minimum(fan, 6 - fan) - 1, 0, 1)


_TINTS = {name: _tint(hue, saturation) for name, (hue, saturation, _) in BACKGROUNDS.items()}
