"""Intervals and tests against scipy and closed forms; invariances over random data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_dpo.evaluation.statistics import (
    effect,
    further_groups,
    holm,
    paired_bootstrap,
    sign_test,
    wilson_interval,
    win_rate_interval,
    z_value,
)

counts = st.tuples(st.integers(0, 300), st.integers(0, 300))
values = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@given(counts.filter(lambda c: c[0] + c[1] > 0))
def test_wilson_is_scipys(pair):
    wins, losses = pair
    low, high = wilson_interval(wins, wins + losses)
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_of_ten_in_ten_by_hand():
    z2 = 1.959963984540054**2
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_mirrors_and_contains_the_rate(n, data):
    halves = data.draw(st.integers(0, 2 * n))
    low, high = wilson_interval(halves / 2, n)
    mirrored = wilson_interval(n - halves / 2, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert 0 <= low <= halves / 2 / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, -1)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, n)


@given(counts)
def test_sign_test_is_scipys(pair):
    wins, losses = pair
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_sign_test_of_large_counts():
    assert sign_test(84, 42) == pytest.approx(stats.binomtest(84, 126).pvalue)
    assert sign_test(5200, 4800) == pytest.approx(stats.binomtest(5200, 10000).pvalue, rel=1e-9)
    assert sign_test(5000, 0) == 0.0
    with pytest.raises(ValueError, match="-1 losses"):
        sign_test(3, -1)


def test_bootstrap_covers_the_mean_like_the_normal_interval():
    differences = np.random.default_rng(0).normal(0.3, 2.0, 400)
    low, high = paired_bootstrap(differences, range(400), seed=1)
    error = differences.std() / 20
    assert low == pytest.approx(differences.mean() - z_value() * error, abs=0.03 * error * 4)
    assert high == pytest.approx(differences.mean() + z_value() * error, abs=0.03 * error * 4)


def test_bootstrap_coverage_of_clustered_data():
    """Images of a prompt share their luck: the interval over prompts covers, one over images would not."""
    rng, covered, naive = np.random.default_rng(3), 0, 0
    groups = [prompt for prompt in range(40) for _ in range(5)]
    for trial in range(200):
        rows = np.repeat(rng.normal(size=40), 5) + 0.2 * rng.normal(size=200)
        low, high = paired_bootstrap(rows, groups, seed=trial, resamples=400)
        covered += low < 0 < high
        low, high = paired_bootstrap(rows, range(200), seed=trial, resamples=400)
        naive += low < 0 < high
    assert 0.89 <= covered / 200 <= 0.99
    assert naive / 200 < 0.75


@settings(max_examples=40)
@given(values, st.randoms(use_true_random=False), st.floats(-5, 5), st.floats(0.1, 5))
def test_bootstrap_invariances(rows, random, shift, scale):
    groups = [f"prompt {random.randrange(5)}" for _ in rows]
    low, high = paired_bootstrap(rows, groups, seed=0, resamples=200)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = paired_bootstrap([rows[i] for i in order], [groups[i] for i in order], seed=0, resamples=200)
    renamed = paired_bootstrap(rows, [hash(group) for group in groups], seed=0, resamples=200)
    np.testing.assert_array_equal(shuffled, (low, high))
    np.testing.assert_array_equal(renamed, (low, high))
    if len(set(groups)) == 1:
        assert math.isnan(low)
        assert math.isnan(high)
        return
    assert min(rows) - 1e-9 <= low <= high <= max(rows) + 1e-9
    scaled = paired_bootstrap([scale * row for row in rows], groups, seed=0, resamples=200)
    np.testing.assert_allclose(scaled, (scale * low, scale * high), atol=1e-9)


def test_bootstrap_is_keyed():
    rows = np.random.default_rng(0).normal(size=50)
    assert paired_bootstrap(rows, range(50), seed=1) == paired_bootstrap(rows, range(50), seed=1)
    assert paired_bootstrap(rows, range(50), seed=1) != paired_bootstrap(rows, range(50), seed=2)


def test_bootstrap_needs_a_group_per_value():
    with pytest.raises(ValueError, match="with 2 groups"):
        paired_bootstrap([1.0, 2.0, 3.0], ["a", "b"], seed=0)


def test_effect_size_by_hand():
    rows = [1.0, 2.0, 3.0, 6.0]
    result = effect(rows, "abcd", seed=0)
    assert result.mean == 3.0
    assert result.d_z == pytest.approx(3.0 / math.sqrt(14 / 3))
    assert result.d_z == pytest.approx(stats.ttest_1samp(rows, 0).statistic / 2)
    assert result.ci95[0] < 3.0 < result.ci95[1]
    mirrored = effect([-row for row in rows], "abcd", seed=0)
    assert (mirrored.mean, mirrored.d_z) == pytest.approx((-3.0, -result.d_z))


def test_effect_size_without_spread_is_unknown():
    assert math.isnan(effect([0.1] * 7, range(7), seed=0).d_z)
    assert math.isnan(effect([0.1], ["a"], seed=0).ci95[0])
    assert math.isnan(effect([], [], seed=0).mean)


def test_win_rate_interval_with_one_image_per_prompt_is_wilsons():
    assert win_rate_interval([1, 1, 0.5, 0], "abcd", seed=0) == wilson_interval(2.5, 4)


def test_win_rate_interval_counts_prompts_not_images():
    outcomes = [1.0] * 30 + [0.0] * 10
    single = win_rate_interval(outcomes, range(40), seed=0)
    clustered = win_rate_interval(outcomes, [i // 10 for i in range(40)], seed=0)
    assert clustered[0] < single[0]
    assert win_rate_interval([1.0] * 40, [i // 10 for i in range(40)], seed=0) == wilson_interval(4, 4)


@given(st.integers(2, 400), st.data())
def test_further_prompts_are_enough_and_needed(n, data):
    halves = data.draw(st.integers(0, 2 * n))
    rate = halves / 2 / n
    ci = wilson_interval(halves / 2, n)
    more = further_groups(rate, n, ci, single=True)
    if halves == n:
        assert more is None
        return
    assert more is not None
    low, high = wilson_interval(rate * (n + more), n + more)
    assert low > 0.5 or high < 0.5
    if more > 1:
        low, high = wilson_interval(rate * (n + more - 1), n + more - 1)
        assert low <= 0.5 + 1e-9
        assert high >= 0.5 - 1e-9


def test_further_prompts_of_a_bootstrap_interval():
    assert further_groups(0.6, 50, (0.52, 0.68), single=False) == 0
    # A half width of .2 has to become .1: four times the prompts, and one for the strict inequality.
    assert further_groups(0.6, 50, (0.4, 0.8), single=False) == pytest.approx(151, abs=1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm_is_monotone_and_between_raw_and_bonferroni(p_values, random):
    adjusted = holm(p_values)
    for raw, p in zip(p_values, adjusted, strict=True):
        assert raw <= p <= min(1.0, len(p_values) * raw) + 1e-12 or p == pytest.approx(max(adjusted))
    ranked = [p for _, p in sorted(zip(p_values, adjusted, strict=True))]
    assert ranked == sorted(ranked)
    order = random.sample(range(len(p_values)), len(p_values))
    assert sorted(holm([p_values[i] for i in order])) == pytest.approx(sorted(adjusted))
