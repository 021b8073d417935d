"""The tiny world's scorer: truth scores high, falsehood and emptiness low, part by part, each picture on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_dpo.errors import UserError
from lora_dpo.scorers.tinyworld import TinyWorldScorer
from lora_dpo.tinyworld import scenes, taste
from lora_dpo.tinyworld.render import render
from lora_dpo.tinyworld.verifier import CATEGORIES, measure


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(5)
    drawn = [scenes.draw_scene(rng) for _ in range(24)]
    images = torch.from_numpy(np.stack([render(scene) for scene in drawn])).permute(0, 3, 1, 2).float() / 255
    return images, [scene.caption for scene in drawn]


def test_truth_scores_high_and_the_score_is_the_preferences_utility(world):
    images, captions = world
    scorer = TinyWorldScorer()
    details = scorer.details(images, captions)
    assert details["strict"].mean() > 0.9
    assert details["alignment"].mean() > 0.9
    scores = scorer(images, captions)
    assert scores.tolist() == pytest.approx([taste.utility(one) for one in measure(images, captions)])
    assert scores.tolist() == pytest.approx((details["alignment"] + details["aesthetic"]).tolist())
    for name in ("alignment", "strict", "mean", "aesthetic"):
        assert details[name].min() >= 0
        assert details[name].max() <= 1


def test_a_detail_is_nan_where_the_caption_says_nothing(world):
    images, captions = world
    details = TinyWorldScorer().details(images, captions)
    assert set(CATEGORIES) < set(details)
    for row, one in enumerate(measure(images, captions)):
        for category in CATEGORIES:
            assert details[category][row].isnan().item() == (one.facts[category] is None)
    assert not details["count"].isnan().any()
    assert details["relation"].isnan().any()


def test_falsehood_and_emptiness_score_low(world):
    images, captions = world
    scorer = TinyWorldScorer()
    true = scorer(images, captions)
    wrong = scorer(images, captions[1:] + captions[:1])
    assert (true > wrong).float().mean() > 0.9
    empty = torch.full((2, 3, scenes.SIZE, scenes.SIZE), 0.95)
    assert (scorer(empty, captions[:2]) < true[:2]).all()
    assert scorer.details(empty, captions[:2])["shading"].isnan().all()
    assert scorer.details(empty, captions[:2])["strict"].tolist() == [0, 0]


def test_each_picture_is_scored_on_its_own(world):
    images, captions = world
    scorer = TinyWorldScorer()
    together = scorer(images[:6], captions[:6])
    alone = [scorer(images[i : i + 1], captions[i : i + 1]).item() for i in range(6)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_what_is_not_of_the_tiny_world_is_the_users_error(world):
    images, captions = world
    with pytest.raises(UserError, match="verifier"):
        TinyWorldScorer()(images[:1], ["an astronaut on the moon"])
    with pytest.raises(UserError, match="shape"):
        TinyWorldScorer()(torch.zeros(1, 3, 32, 32), captions[:1])
