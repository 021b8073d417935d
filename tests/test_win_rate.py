"""The comparison of two sets of scores: counts by hand, symmetry, groups, missing details, honest intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_dpo.errors import LoraDpoError
from lora_dpo.evaluation.statistics import sign_test, wilson_interval
from lora_dpo.evaluation.win_rate import compare, compare_details

NAN = math.nan


def test_counts_by_hand():
    result = compare([3.0, 2.0, 1.0, 5.0], [1.0, 2.0, 2.0, 1.0], ["a", "b", "c", "d"], seed=0)
    assert (result.n, result.prompts, result.wins, result.ties, result.losses) == (4, 4, 2, 1, 1)
    assert result.win_rate == 0.625
    assert result.ci95 == wilson_interval(2.5, 4)
    assert result.p_value == sign_test(2, 1)
    assert (result.mean_a, result.mean_b, result.effect.mean) == (2.75, 1.5, 1.25)
    assert result.further_prompts == 58  # z² / (4 · 0.125²) = 61.46, of which 4 are there
    assert result.p_holm is None


def test_tensors_arrays_and_lists_are_the_same():
    a, b = [0.5, 0.25, 1.0], [0.25, 0.5, 1.0]
    expected = compare(a, b, "abc", seed=0)
    assert compare(torch.tensor(a, dtype=torch.bfloat16), torch.tensor(b), "abc", seed=0) == expected
    assert compare(np.array(a), np.array(b), "abc", seed=0) == expected


def test_more_images_of_a_prompt_are_not_more_evidence():
    once = compare([1.0] * 6 + [0.0] * 2, [0.5] * 8, range(8), seed=0)
    copied = compare(([1.0] * 6 + [0.0] * 2) * 20, [0.5] * 160, list(range(8)) * 20, seed=0)
    assert copied.n == 160
    assert copied.prompts == 8
    assert copied.win_rate == once.win_rate
    assert copied.p_value == once.p_value
    assert copied.ci95[0] < 0.6
    assert copied.effect.ci95 == pytest.approx(once.effect.ci95)


def test_a_unanimous_result_keeps_an_interval():
    result = compare([1.0] * 12, [0.0] * 12, [i // 3 for i in range(12)], seed=0)
    assert result.win_rate == 1.0
    assert result.ci95 == wilson_interval(4, 4)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=25))
def test_swapping_the_sides_mirrors_everything(rows):
    a, b, prompts = ([row[k] for row in rows] for k in range(3))
    forth, back = compare(a, b, prompts, seed=0), compare(b, a, prompts, seed=0)
    assert (forth.wins, forth.ties, forth.losses) == (back.losses, back.ties, back.wins)
    assert forth.win_rate == pytest.approx(1 - back.win_rate)
    assert forth.p_value == back.p_value
    assert forth.effect.mean == pytest.approx(-back.effect.mean)
    if len(set(prompts)) == len(prompts):
        assert forth.ci95 == pytest.approx((1 - back.ci95[1], 1 - back.ci95[0]))
    assert forth.ci95[0] - 1e-9 <= forth.win_rate <= forth.ci95[1] + 1e-9


def test_details_leave_out_what_does_not_apply():
    a = {"count": [1.0, NAN, 1.0, 0.0], "size": [0.5, 0.5, 0.5, NAN], "never": [NAN] * 4}
    b = {"count": [0.0, 1.0, NAN, 0.0], "size": [0.1, 0.2, 0.3, 0.4], "never": [NAN] * 4}
    result = compare_details(a, b, ["p", "q", "r", "s"], seed=0)
    assert list(result) == ["count", "size"]
    count, size = result["count"], result["size"]
    assert (count.n, count.excluded, count.wins, count.ties, count.losses) == (2, 2, 1, 1, 0)
    assert (size.n, size.excluded, size.wins) == (3, 1, 3)
    assert size.p_value == 0.25
    assert size.p_holm == 0.5
    assert count.p_holm == 1.0


def test_json_has_no_nan():
    [single] = compare_details({"x": [1.0]}, {"x": [0.0]}, ["p"], seed=0).values()
    document = json.loads(json.dumps(single.to_json(), allow_nan=False))
    assert document["effect"] == {"mean": 1.0, "ci95": [None, None], "d_z": None}
    assert document["ci95"] == list(single.ci95)
    assert document["win_rate"] == 1.0


@pytest.mark.parametrize(
    ("a", "b", "prompts", "message"),
    [
        ([], [], [], "no scores"),
        ([1.0], [1.0, 2.0], ["p"], "1 scores against 2 for 1 prompts"),
        ([1.0, NAN], [1.0, 1.0], ["p", "a blue star"], "'a blue star' is nan"),
        ([1.0], [math.inf], ["p"], "'p' is inf"),
    ],
)
def test_scores_that_cannot_be_compared(a, b, prompts, message):
    with pytest.raises(LoraDpoError, match=message):
        compare(a, b, prompts, seed=0)


def test_details_have_to_match():
    with pytest.raises(LoraDpoError, match="details differ"):
        compare_details({"x": [1.0]}, {"y": [1.0]}, ["p"], seed=0)
    with pytest.raises(LoraDpoError, match="infinite"):
        compare_details({"x": [math.inf]}, {"x": [1.0]}, ["p"], seed=0)
