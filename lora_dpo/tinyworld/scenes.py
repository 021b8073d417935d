"""The tiny world's scenes and the grammar of their captions.

A scene is one to four coloured shapes on a light background. Its caption names colours, shapes, and, depending on the
kind of scene, size, texture, count, spatial relation and background. What no caption names is the *look* of the
picture: its style (flat, outlined, or shaded with a soft shadow), how vivid it is, and the size of objects whose size
is not named. People's preferences have the same two parts: does it show what was asked, and is it pleasant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

SIZE = 64  # pixels, both sides
COLOURS = {"red": 2, "orange": 27, "yellow": 50, "green": 130, "blue": 215, "purple": 272, "pink": 325}  # hue, degrees
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
TEXTURES = ("striped", "dotted")
BACKGROUNDS = {"white": (0, 0.0, 0.98), "cream": (42, 0.16, 0.98), "sky": (205, 0.20, 0.97), "mint": (150, 0.17, 0.94)}
SIZES = {"small": (9.0, 11.5), "large": (18.5, 22.0)}  # radius in pixels, of single objects
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3, "four": 4}
STYLES = ("flat", "outlined", "shaded")
KINDS = ("single", "pair", "relation", "count")
KIND_SHARES = (0.30, 0.12, 0.36, 0.22)
STYLE_SHARES = (0.40, 0.30, 0.30)
WORDS = ("a", "an", "and", "on", "background", *COLOURS, *SHAPES, *(s + "s" for s in SHAPES if s != "cross"), "crosses",
         *TEXTURES, *BACKGROUNDS, *SIZES, "left", "right", "of", "above", "below", *COUNTS)  # fmt: skip

Kind = Literal["single", "pair", "relation", "count"]


@dataclass(frozen=True)
class Item:
    """What a caption says of one object; None where it is silent."""

    shape: str
    colour: str
    texture: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything a caption asserts. For `count`, `items` has one entry and `count` tells how many there are."""

    kind: Kind
    items: tuple[Item, ...]
    count: int
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Placed:
    """One drawn object: centre and radius in pixels, `turn` in radians."""

    item: Item
    x: float
    y: float
    radius: float
    turn: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture to draw, and the caption that goes with it."""

    facts: Facts
    objects: tuple[Placed, ...]
    background: str
    style: str
    vividness: float  # 0 muted … 1 vivid

    @property
    def caption(self) -> str:
        return write(self.facts)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def write(facts: Facts) -> str:
    """The caption of some facts; `read` is its inverse."""

    def phrase(item: Item, many: bool = False) -> str:
        return " ".join(
            w for w in (item.size, item.texture, item.colour, plural(item.shape) if many else item.shape) if w
        )

    if facts.kind == "count":
        word = next(w for w, n in COUNTS.items() if n == facts.count)
        text = f"{word} {phrase(facts.items[0], many=True)}"
    else:
        joint = f" {facts.relation or 'and'} "
        text = joint.join(("an " if phrase(item)[0] in "aeiou" else "a ") + phrase(item) for item in facts.items)
    return f"{text} on a {facts.background} background" if facts.background else text


_ITEM = (
    rf"(?:(?P<size{{0}}>{'|'.join(SIZES)}) )?(?:(?P<texture{{0}}>{'|'.join(TEXTURES)}) )?"
    rf"(?P<colour{{0}}>{'|'.join(COLOURS)}) (?P<shape{{0}}>{'|'.join(SHAPES)})"
)
_CAPTION = re.compile(
    rf"(?:(?P<count>{'|'.join(COUNTS)}) {_ITEM.format('0')}(?:s|es)|"
    rf"an? {_ITEM.format('1')}(?: (?P<joint>and|{'|'.join(RELATIONS)}) an? {_ITEM.format('2')})?)"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def read(caption: str) -> Facts:
    """The facts of a caption.

    Raises:
        ValueError: the caption is not in the grammar.
    """
    found = _CAPTION.fullmatch(caption.strip())
    if not found:
        raise ValueError(f"not a caption of the tiny world: {caption!r}")
    said = found.groupdict()

    def item(slot: str) -> Item:
        return Item(said["shape" + slot], said["colour" + slot], said["texture" + slot], said["size" + slot])

    if said["count"]:
        return Facts("count", (item("0"),), COUNTS[said["count"]], None, said["background"])
    if not said["joint"]:
        return Facts("single", (item("1"),), 1, None, said["background"])
    relation = None if said["joint"] == "and" else said["joint"]
    kind: Kind = "relation" if relation else "pair"
    return Facts(kind, (item("1"), item("2")), 2, relation, said["background"])


def draw_facts(rng: np.random.Generator, kind: Kind | None = None) -> Facts:
    """Random facts: a caption to render, or to ask a model for."""
    kind = kind or KINDS[rng.choice(len(KINDS), p=KIND_SHARES)]
    colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    texture = str(rng.choice(TEXTURES)) if rng.random() < 0.4 else None
    size = str(rng.choice(list(SIZES))) if rng.random() < 0.35 else None
    if kind == "single":
        return Facts(kind, (Item(str(shapes[0]), str(colours[0]), texture, size),), 1, None, background)
    if kind == "count":
        count = int(rng.choice(list(COUNTS.values())))
        return Facts(kind, (Item(str(shapes[0]), str(colours[0])),), count, None, background)
    items = tuple(Item(str(shapes[i]), str(colours[i])) for i in range(2))
    relation = str(rng.choice(RELATIONS)) if kind == "relation" else None
    return Facts(kind, items, 2, relation, background)


def draw_scene(rng: np.random.Generator, facts: Facts | None = None) -> Scene:
    """A random scene in which the facts hold; everything the caption leaves open is drawn at random."""
    facts = facts or draw_facts(rng)
    background = facts.background or str(rng.choice(list(BACKGROUNDS)))
    style = STYLES[rng.choice(len(STYLES), p=STYLE_SHARES)]
    return Scene(facts, _place(rng, facts), background, style, float(rng.random()))


def _place(rng: np.random.Generator, facts: Facts) -> tuple[Placed, ...]:
    def put(item: Item, x: float, y: float, jitter: float, radius: float) -> Placed:
        dx, dy = rng.uniform(-jitter, jitter, 2)
        keep = radius + 1.0  # the whole object stays in the picture
        x, y = (float(min(max(v, keep), SIZE - keep)) for v in (x + dx, y + dy))
        return Placed(item, x, y, radius, float(rng.uniform(-0.12, 0.12)))

    middle = SIZE / 2
    if facts.kind == "single":
        item = facts.items[0]
        low, high = SIZES[item.size] if item.size else (SIZES["small"][0], SIZES["large"][1])
        return (put(item, middle, middle, 5, float(rng.uniform(low, high))),)
    if facts.kind == "count":
        item, radius = facts.items[0], float(rng.uniform(7.0, 11.5))
        layouts = {
            2: [[(17, 32), (47, 32)], [(32, 17), (32, 47)], [(18, 18), (46, 46)], [(46, 18), (18, 46)]],
            3: [[(17, 46), (47, 46), (32, 18)], [(17, 18), (47, 18), (32, 46)]],
            4: [[(17, 17), (47, 17), (17, 47), (47, 47)]],
        }[facts.count]
        return tuple(put(item, x, y, 2.5, radius) for x, y in layouts[rng.integers(len(layouts))])
    relation = facts.relation or RELATIONS[rng.integers(4)]
    near, far, across = 17.0, 47.0, 32.0
    first = {"left of": (near, across), "right of": (far, across), "above": (across, near), "below": (across, far)}
    x, y = first[relation]
    scale = float(rng.uniform(8.0, 13.0))
    spots = ((x, y), (SIZE - x, SIZE - y))
    return tuple(
        put(item, sx, sy, 2.0, scale * float(rng.uniform(0.9, 1.08)))
        for item, (sx, sy) in zip(facts.items, spots, strict=True)
    )
