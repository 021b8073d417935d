"""The tiny world's grammar and renderer: what a caption says is what is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.tinyworld import render, scenes
from lora_dpo.tinyworld.scenes import Facts, Item


def draws(count: int, kind: scenes.Kind | None = None, seed: int = 0) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_scene(rng, scenes.draw_facts(rng, kind)) for _ in range(count)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_reading_inverts_writing(seed: int) -> None:
    facts = scenes.draw_facts(np.random.default_rng(seed))
    assert scenes.read(scenes.write(facts)) == facts


def test_captions_read_like_english() -> None:
    assert scenes.write(Facts("single", (Item("star", "orange"),), 1)) == "an orange star"
    assert (
        scenes.write(Facts("count", (Item("cross", "red"),), 3, None, "mint"))
        == "three red crosses on a mint background"
    )
    pair = Facts("relation", (Item("heart", "blue"), Item("square", "pink")), 2, "left of", None)
    assert scenes.write(pair) == "a blue heart left of a pink square"
    said = scenes.read("a small dotted yellow circle on a sky background")
    assert said == Facts("single", (Item("circle", "yellow", "dotted", "small"),), 1, None, "sky")


def test_every_word_of_every_caption_is_in_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    used = {word for _ in range(500) for word in scenes.write(scenes.draw_facts(rng)).split()}
    assert used == set(scenes.WORDS)


@pytest.mark.parametrize(
    "caption", ["", "red circle", "a mauve circle", "five red circles", "a red circle on a blue background"]
)
def test_other_sentences_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        scenes.read(caption)


def test_kinds_and_styles_have_their_shares() -> None:
    many = draws(600)
    kinds, styles = Counter(s.facts.kind for s in many), Counter(s.style for s in many)
    for kind, share in zip(scenes.KINDS, scenes.KIND_SHARES, strict=True):
        assert kinds[kind] / len(many) == pytest.approx(share, abs=0.06)
    for style, share in zip(scenes.STYLES, scenes.STYLE_SHARES, strict=True):
        assert styles[style] / len(many) == pytest.approx(share, abs=0.06)


def test_objects_lie_inside_the_picture_and_apart() -> None:
    for scene in draws(80):
        edges = [render.distance(placed) for placed in scene.objects]
        for edge in edges:
            border = np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]])
            assert border.min() > -1.2, scene  # at most the tip of a point meets the border
        for i, first in enumerate(edges):
            for second in edges[i + 1 :]:
                assert ((first < 0) & (second < 0)).mean() < 0.01, scene


def test_what_a_caption_says_holds_in_its_scene() -> None:
    seen = Counter()
    for scene in draws(200):
        facts, objects = scene.facts, scene.objects
        assert len(objects) == facts.count
        assert facts.background in (None, scene.background)
        if facts.kind == "count":
            assert {placed.item for placed in objects} == set(facts.items)
        else:
            assert tuple(placed.item for placed in objects) == facts.items
        if facts.items[0].size:
            low, high = scenes.SIZES[facts.items[0].size]
            assert low <= objects[0].radius <= high
        if facts.relation:
            a, b = objects
            ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
            assert ahead[facts.relation] > 20
            seen[facts.relation] += 1
    assert set(seen) == set(scenes.RELATIONS)


def test_scenes_and_pictures_are_functions_of_the_seed() -> None:
    first, again, other = draws(8), draws(8), draws(8, seed=1)
    assert first == again
    assert first != other
    for a, b in zip(first, again, strict=True):
        picture = render.render(a)
        assert picture.dtype == np.uint8
        assert picture.shape == (scenes.SIZE, scenes.SIZE, 3)
        np.testing.assert_array_equal(picture, render.render(b))


def test_fields_are_distances_to_the_outline() -> None:
    circle = render.field("circle")
    axis = np.linspace(-render.REACH, render.REACH, render.GRID)
    expected = np.hypot(*np.meshgrid(axis, axis)) - 1
    np.testing.assert_allclose(circle, expected, atol=0.01)
    for shape in scenes.SHAPES:
        assert render.field(shape).min() < -0.3
        assert (render.field(shape)[0] > 0).all()
    with pytest.raises(ValueError, match="no such shape"):
        render.outline("spiral")
