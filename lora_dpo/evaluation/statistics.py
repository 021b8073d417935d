"""Intervals and tests for paired comparisons.

Images of one prompt are not independent, so every interval here resamples or counts prompts ("groups"). All
functions are deterministic: the bootstrap's draws are keyed by its seed and do not depend on the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lora_dpo.randomness import numpy_generator

CONFIDENCE = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Effect:
    """The mean of paired differences, its bootstrap interval over groups, and Cohen's d_z = mean / sd (ddof 1).

    NaN stands for what the data can't say: an interval from a single group, d_z without spread.
    """

    mean: float
    ci95: Interval
    d_z: float


def z_value(confidence: float = CONFIDENCE) -> float:
    """Two-sided normal quantile: 1.96 at 95 %."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence has to lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson_interval(successes: int | float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a proportion (Wilson 1927), inside [0, 1] also for 0 or n successes.

    Args:
        successes: may be a half count, where ties count half; (0, 1) is returned for n = 0.
    """
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    z, rate = z_value(confidence), successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` under a fair coin; ties are left out. 1.0 without data."""
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses")
    n, fewer = wins + losses, min(wins, losses)
    # Python integers: no rounding in the sum, and no underflow before the one division.
    term = total = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def paired_bootstrap(
    differences: Sequence[int | float] | np.ndarray,
    groups: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile interval of the mean difference, whole groups (prompts) drawn with replacement.

    (nan, nan) for fewer than two groups, from which no spread can be estimated.
    """
    sums, counts = _by_group(differences, groups)
    if len(sums) < 2:
        return math.nan, math.nan
    draws = numpy_generator(seed, "bootstrap", len(sums))
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // len(sums))  # bounds the table of drawn counts to 32 MB
    for start in range(0, resamples, chunk):
        drawn = draws.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(chunk, resamples - start))
        means[start : start + len(drawn)] = (drawn @ sums) / (drawn @ counts)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def effect(differences: Sequence[int | float] | np.ndarray, groups: Sequence[Hashable], *, seed: int) -> Effect:
    """Mean paired difference with its interval over groups, and d_z over the single differences."""
    values = np.asarray(differences, dtype=np.float64)
    if values.size == 0:
        return Effect(math.nan, (math.nan, math.nan), math.nan)
    mean = float(values.mean())
    spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
    # Equal differences have a spread of rounding size, which would pass for an enormous effect.
    flat = spread <= 1e-12 * float(np.abs(values).max())
    return Effect(mean, paired_bootstrap(values, groups, seed=seed), math.nan if flat else mean / spread)


def win_rate_interval(
    outcomes: Sequence[int | float] | np.ndarray, groups: Sequence[Hashable], *, seed: int
) -> Interval:
    """95 % interval of the mean of outcomes in {0, ½, 1}.

    Wilson's with one image per prompt; otherwise the bootstrap over prompts. Where all prompts agree the bootstrap
    has no width, so Wilson's over prompts takes its place, as if the images of a prompt were one.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    sums, counts = _by_group(values, groups)
    if len(sums) == len(values):
        return wilson_interval(float(values.sum()), len(values))
    rates = sums / counts
    if np.all(rates == rates[0]):
        return wilson_interval(float(rates[0]) * len(rates), len(rates))
    return paired_bootstrap(values, groups, seed=seed)


def further_groups(
    rate: float, groups: int, ci: Interval, *, single: bool, confidence: float = CONFIDENCE
) -> int | None:
    """How many more prompts make the interval exclude ½ if the win rate stays; 0 if it does so now, None at ½ itself.

    Args:
        single: one image per prompt. Then Wilson's interval excludes ½ as soon as n > z² / (4 (rate − ½)²);
            otherwise the bootstrap's half width is taken to shrink with the square root of the number of prompts.
    """
    if ci[0] > 0.5 or ci[1] < 0.5:
        return 0
    distance = abs(rate - 0.5)
    if distance == 0 or math.isnan(rate):
        return None
    if single or math.isnan(ci[0]):
        needed = (z_value(confidence) / (2 * distance)) ** 2
    else:
        half = rate - ci[0] if rate > 0.5 else ci[1] - rate
        needed = groups * (half / distance) ** 2
    return max(1, math.floor(needed) + 1 - groups)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order, that hold the family-wise error rate (Holm 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _by_group(values: Sequence[int | float] | np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count per group, the groups sorted by their content so that the order of the rows can't matter."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) != len(groups):
        raise ValueError(f"values of shape {array.shape} with {len(groups)} groups")
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(array.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    rows = sorted((math.fsum(rows), len(rows)) for rows in members.values())
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.float64)
