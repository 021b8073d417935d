"""The verifier tells true captions from wrong ones, on clean, degraded and foreign pictures, and measures looks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from lora_dpo.errors import UserError
from lora_dpo.tinyworld import scenes
from lora_dpo.tinyworld.render import render
from lora_dpo.tinyworld.scenes import Facts, Item, Placed, Scene
from lora_dpo.tinyworld.verifier import CATEGORIES, Measurement, Seen, holds, measure

PER_STYLE = 60


def scenes_of(style: str, count: int = PER_STYLE) -> list[Scene]:
    rng = np.random.default_rng(len(style))
    return [replace(scenes.draw_scene(rng), style=style) for _ in range(count)]


@pytest.fixture(scope="module")
def world() -> tuple[list[Scene], np.ndarray]:
    drawn = [scene for style in scenes.STYLES for scene in scenes_of(style)]
    return drawn, np.stack([render(scene) for scene in drawn])


def rates(measured: list[Measurement]) -> dict[str, float]:
    said = {c: [m.facts[c] for m in measured if m.facts[c] is not None] for c in CATEGORIES}
    return {c: float(np.mean(v)) for c, v in said.items()}


def test_true_captions_are_true(world: tuple[list[Scene], np.ndarray]) -> None:
    drawn, images = world
    measured = measure(images, [scene.caption for scene in drawn])
    assert min(rates(measured).values()) >= 0.99
    assert np.mean([m.strict for m in measured]) >= 0.99
    assert np.mean([m.style == scene.style for m, scene in zip(measured, drawn, strict=True)]) >= 0.99
    assert all(m.background == scene.background for m, scene in zip(measured, drawn, strict=True))


def wrong(facts: Facts, rng: np.random.Generator) -> Facts:
    """The same facts with one of them false."""
    k = int(rng.integers(len(facts.items)))
    item = facts.items[k]

    def other(names: object, than: str | None) -> str:
        return str(rng.choice([name for name in names if name != than]))  # pyright: ignore

    def put(new: Item) -> Facts:
        return replace(facts, items=tuple(new if j == k else i for j, i in enumerate(facts.items)))

    ways: list[Callable[[], Facts]] = [
        lambda: put(replace(item, shape=other(scenes.SHAPES, item.shape))),
        lambda: put(replace(item, colour=other(scenes.COLOURS, item.colour))),
    ]
    if facts.kind == "single":
        ways.append(lambda: put(replace(item, texture=other(scenes.TEXTURES, item.texture))))
    if item.size:
        ways.append(lambda: put(replace(item, size=other(scenes.SIZES, item.size))))
    if facts.kind == "count":
        ways.append(lambda: replace(facts, count=facts.count % 3 + 2))
    if facts.relation:
        ways.append(lambda: replace(facts, relation=other(scenes.RELATIONS, facts.relation)))
    if len(facts.items) == 2:
        a, b = facts.items
        ways.append(lambda: replace(facts, items=(replace(a, colour=b.colour), replace(b, colour=a.colour))))
    if facts.background:
        ways.append(lambda: replace(facts, background=other(scenes.BACKGROUNDS, facts.background)))
    return ways[rng.integers(len(ways))]()


def test_one_wrong_word_is_found(world: tuple[list[Scene], np.ndarray]) -> None:
    drawn, images = world
    rng = np.random.default_rng(3)
    measured = measure(images, [scenes.write(wrong(scene.facts, rng)) for scene in drawn])
    assert np.mean([m.strict for m in measured]) < 0.01
    assert np.mean([m.mean for m in measured]) > 0.6  # most of what such a caption says is still true


@pytest.mark.parametrize("damage", ["blur", "noise", "colour shift", "all"])
def test_degraded_pictures_are_judged_alike(world: tuple[list[Scene], np.ndarray], damage: str) -> None:
    drawn, images = world
    rng = np.random.default_rng(4)
    worse = images / 255.0
    if damage in ("blur", "all"):
        worse = ndimage.gaussian_filter(worse, (0, 0.6, 0.6, 0))
    if damage in ("noise", "all"):
        worse = worse + rng.normal(0, 0.02, worse.shape)
    if damage in ("colour shift", "all"):
        worse = worse * rng.uniform(0.95, 1.05, (len(worse), 1, 1, 3)) + rng.uniform(-0.03, 0.03, (len(worse), 1, 1, 3))
    measured = measure(np.clip(worse, 0, 1), [scene.caption for scene in drawn])
    found = rates(measured)
    assert min(found.values()) >= (0.9 if "shift" in damage or damage == "all" else 0.97)  # tints change backgrounds
    assert min(found[c] for c in ("shape", "colour", "count", "relation", "size")) >= 0.98
    assert np.mean([m.style == scene.style for m, scene in zip(measured, drawn, strict=True)]) > 0.97


def test_looks_are_measured(world: tuple[list[Scene], np.ndarray]) -> None:
    drawn, images = world
    captions = [scene.caption for scene in drawn]
    measured = measure(images, captions)
    shading = {
        s: [m.style_shading for m, d in zip(measured, drawn, strict=True) if d.style == s] for s in scenes.STYLES
    }
    assert np.median(shading["shaded"]) == pytest.approx(1, abs=0.15)
    assert min(shading["shaded"]) > 0.55
    assert max(map(abs, shading["flat"] + shading["outlined"])) < 0.3
    vividness = np.array([(m.vividness, d.vividness) for m, d in zip(measured, drawn, strict=True)])
    assert np.abs(vividness[:, 0] - vividness[:, 1]).max() < 0.1
    blurred = measure(ndimage.gaussian_filter(images / 255.0, (0, 0.8, 0.8, 0)), captions)
    noisy = measure(np.clip(images / 255.0 + np.random.default_rng(5).normal(0, 0.02, images.shape), 0, 1), captions)
    for clean, blur, noise in zip(measured, blurred, noisy, strict=True):
        assert clean.crispness > 0.7
        assert blur.crispness < clean.crispness - 0.2
        assert noise.crispness < clean.crispness - 0.2


@pytest.mark.parametrize(("caption", "low", "high"), [("a red circle", 9, 22), ("a large red circle", 18.5, 22)])
def test_size_is_relative_to_the_caption(caption: str, low: float, high: float) -> None:
    facts = scenes.read(caption)
    for radius, expected in ((low, 0.0), ((low + high) / 2, 0.5), (high, 1.0)):
        scene = Scene(facts, (Placed(facts.items[0], 32, 32, radius),), "white", "flat", 1.0)
        assert measure(render(scene)[None], [caption])[0].size == pytest.approx(expected, abs=0.06)


# --- pictures that the renderer didn't draw ---


def canvas(background: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (256, 256), background)
    return image, ImageDraw.Draw(image)


def judged(image: Image.Image, caption: str) -> Measurement:
    small = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
    return measure(small[None], [caption])[0]


def star_points(x: float, y: float, radius: float, inner: float) -> list[tuple[float, float]]:
    angles = [-math.pi / 2 + k * math.pi / 5 for k in range(10)]
    return [
        (x + (radius if k % 2 == 0 else inner) * math.cos(a), y + (radius if k % 2 == 0 else inner) * math.sin(a))
        for k, a in enumerate(angles)
    ]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: str) -> None:
    """Shapes of other proportions than the renderer's."""
    if shape == "circle":
        draw.ellipse((x - r, y - 0.9 * r, x + r, y + 0.9 * r), fill)
    elif shape == "square":
        draw.rounded_rectangle((x - r, y - 0.92 * r, x + r, y + 0.92 * r), 0.2 * r, fill)
    elif shape == "triangle":
        draw.polygon([(x + 0.1 * r, y - r), (x + r, y + r), (x - r, y + 0.9 * r)], fill)
    elif shape == "star":
        draw.polygon(star_points(x, y, 1.1 * r, 0.45 * r), fill)
    elif shape == "heart":
        h = 0.52 * r
        draw.ellipse((x - 2 * h, y - 1.6 * h, x, y + 0.4 * h), fill)
        draw.ellipse((x, y - 1.6 * h, x + 2 * h, y + 0.4 * h), fill)
        draw.polygon([(x - 1.82 * h, y), (x + 1.82 * h, y), (x, y + 1.9 * h)], fill)
        draw.rectangle((x - 0.9 * h, y - 0.6 * h, x + 0.9 * h, y + 0.1 * h), fill)
    elif shape == "cross":
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)


PAINT = {"red": "crimson", "orange": "darkorange", "yellow": "gold", "green": "limegreen", "blue": "royalblue",
         "purple": "#7c3bd0", "pink": "#f04fae"}  # fmt: skip


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_foreign_drawings_are_read_as_people_read_them(shape: str, colour: str) -> None:
    image, draw = canvas("#fbf0d8")
    draw_shape(draw, shape, 122, 131, 58, PAINT[colour])
    assert judged(image, f"a {colour} {shape} on a cream background".replace("a o", "an o")).strict
    others = [other for other in scenes.SHAPES if other != shape]
    assert not any(judged(image, f"a {colour} {other}".replace("a o", "an o")).facts["shape"] for other in others)


def test_foreign_textures() -> None:
    image, draw = canvas()
    draw_shape(draw, "square", 128, 128, 70, "royalblue")
    for y in range(64, 196, 24):
        draw.rectangle((62, y, 194, y + 9), "midnightblue")
    assert judged(image, "a striped blue square").strict  # horizontal, where the renderer's run diagonally
    assert judged(image, "a dotted blue square").facts["texture"] is False
    image, draw = canvas()
    draw_shape(draw, "circle", 128, 128, 80, "crimson")
    for x in range(76, 200, 34):
        for y in range(76, 200, 34):
            if math.hypot(x - 128, y - 128) < 66:
                draw.ellipse((x - 7, y - 7, x + 7, y + 7), "#600818")
    assert judged(image, "a dotted red circle").strict
    assert judged(image, "a striped red circle").facts["texture"] is False
    assert judged(image, "a large red circle").facts["texture"] is None


def test_objects_too_many_and_too_few() -> None:
    image, draw = canvas()
    draw_shape(draw, "circle", 70, 128, 34, "crimson")
    alone = judged(image, "a red circle left of a blue square")
    assert (alone.facts["count"], alone.facts["shape"], alone.facts["relation"]) == (False, False, False)
    draw_shape(draw, "square", 190, 128, 34, "royalblue")
    both = judged(image, "a red circle left of a blue square")
    assert both.strict
    assert [(o.shape, o.colour) for o in sorted(both.objects, key=lambda o: o.x)] == [
        ("circle", "red"),
        ("square", "blue"),
    ]
    single = judged(image, "a red circle")
    assert (single.facts["count"], single.facts["shape"], single.facts["colour"]) == (False, True, True)
    swapped = judged(image, "a blue circle left of a red square")
    assert (swapped.facts["shape"], swapped.facts["colour"], swapped.facts["relation"]) == (True, False, True)
    assert judged(image, "a blue square left of a red circle").facts["relation"] is False
    draw.point([(20, 20), (21, 20)], "black")
    draw.ellipse((232, 20, 240, 28), "crimson")
    assert judged(image, "a red circle left of a blue square").strict  # specks aren't objects


def test_touching_objects_are_parted() -> None:
    image, draw = canvas("#d8eefc")
    draw_shape(draw, "circle", 84, 128, 46, "crimson")
    draw_shape(draw, "square", 168, 128, 42, "royalblue")
    assert judged(image, "a red circle left of a blue square").strict
    image, draw = canvas()
    for x in (76, 176):
        draw_shape(draw, "circle", x, 128, 52, "limegreen")
    assert judged(image, "two green circles").strict


def test_a_ring_a_blob_a_smear_and_a_rainbow_are_not_shapes_of_one_colour() -> None:
    image, draw = canvas()
    draw.ellipse((50, 50, 206, 206), outline="crimson", width=22)
    assert judged(image, "a red circle").facts["shape"] is False
    image, draw = canvas()
    draw.polygon([(40, 120), (110, 128), (90, 40), (130, 110), (220, 90), (150, 140), (170, 170), (60, 230)], "crimson")
    assert judged(image, "a red heart").facts["shape"] is False
    image, draw = canvas()
    draw.ellipse((60, 60, 190, 190), "#f8e8e8")
    assert judged(image, "a red circle").facts == {
        **dict.fromkeys(CATEGORIES),
        "shape": False,
        "colour": False,
        "count": False,
    }
    image, draw = canvas()
    for k, name in enumerate(("crimson", "gold", "limegreen", "royalblue")):
        draw.pieslice((60, 60, 196, 196), 90 * k, 90 * k + 90, name)
    assert not any(judged(image, f"a {name} circle").strict for name in ("red", "yellow", "green", "blue"))


def test_a_shadow_is_neither_an_object_nor_an_outline() -> None:
    image, draw = canvas("#fbf0d8")
    draw.ellipse((70, 78, 206, 214), "#c9c0ad")
    draw.ellipse((58, 58, 194, 194), "#2f6fdd")
    seen = judged(image, "a blue circle on a cream background")
    assert seen.strict
    assert 0.3 < seen.style_shading < 0.7  # a shadow, but the ball itself is flat


def test_an_empty_picture_shows_nothing() -> None:
    seen = measure(np.full((2, 64, 64, 3), 250, np.uint8), ["a red circle", "two red circles on a white background"])
    assert [s.mean for s in seen] == [0, 0.25]
    assert seen[1].facts["background"]
    assert not seen[0].objects
    assert math.isnan(seen[0].size)
    assert math.isnan(seen[0].style_shading)
    assert math.isnan(seen[0].vividness)
    assert seen[0].crispness == 0


# --- the interface ---


@pytest.mark.parametrize(
    ("relation", "x", "y", "true"),
    [("left of", 20, 3, True), ("left of", 20, 22, True), ("left of", 20, 30, False), ("left of", 4, 0, False),
     ("right of", -20, 0, True), ("above", 3, 20, True), ("below", 3, 20, False), ("below", 0, -20, True)],
)  # fmt: skip
def test_relations(relation: str, x: float, y: float, true: bool) -> None:
    def seen(a: float, b: float) -> Seen:
        return Seen("circle", "red", a, b, 8, 1)

    assert holds(relation, seen(30, 30), seen(30 + x, 30 + y)) is true


def test_every_form_of_picture_and_any_batch_is_judged_the_same(world: tuple[list[Scene], np.ndarray]) -> None:
    drawn, images = world
    images, captions = images[::9], [scene.caption for scene in drawn[::9]]
    expected = measure(images, captions)
    planes = torch.tensor(images).permute(0, 3, 1, 2)
    assert measure(planes, captions) == expected
    assert measure(planes.float() / 255, captions) == expected
    assert [measure(images[k : k + 1], captions[k : k + 1])[0] for k in range(12)] == expected[:12]
    assert measure(images[:0], []) == []


def test_what_cannot_be_judged_is_refused() -> None:
    picture = np.zeros((1, 3, 64, 64))
    with pytest.raises(UserError, match="64x64"):
        measure(np.zeros((1, 3, 128, 128)), ["a red circle"])
    with pytest.raises(UserError, match="not a caption"):
        measure(picture, ["a photo of a cat"])
    with pytest.raises(UserError, match="1 pictures but 2 captions"):
        measure(picture, ["a red circle", "a red circle"])
