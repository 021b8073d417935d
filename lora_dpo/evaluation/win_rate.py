"""Which of two sets of images scores higher on the same prompts and seeds, and by how much."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from lora_dpo.errors import LoraDpoError
from lora_dpo.evaluation.statistics import Effect, Interval, effect, further_groups, holm, sign_test, win_rate_interval

Scores = Sequence[int | float] | np.ndarray | Tensor


@dataclass(frozen=True)
class Comparison:
    """A against B, image by image. Above ½, the win rate says that A scores higher.

    Attributes:
        n: images compared; `excluded` had no score (NaN) on one side.
        prompts: distinct prompts among them: the independent units of every interval and of the p-value.
        win_rate: (wins + ties / 2) / n, with its 95 % interval.
        p_value: exact two-sided sign test; with several images per prompt, over the prompts' majorities.
        p_holm: the p-value after Holm's correction over the details it was tested with; None if it was the only one.
        effect: mean of A − B with its 95 % interval, and Cohen's d_z.
        further_prompts: how many more prompts would let the interval exclude ½ at this rate; 0 if it does already.
    """

    n: int
    prompts: int
    excluded: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    ci95: Interval
    p_value: float
    mean_a: float
    mean_b: float
    effect: Effect
    further_prompts: int | None
    p_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; NaN and infinities become None."""
        return _plain(asdict(self))


def compare(scores_a: Scores, scores_b: Scores, prompts: Sequence[Hashable], *, seed: int) -> Comparison:
    """A against B, e.g. `compare(adapted, base, prompts, seed=0)`: rows are the same prompt and seed on both sides.

    Args:
        prompts: one per row; rows of an equal prompt are one group.
        seed: keys the bootstrap.

    Raises:
        LoraDpoError: no rows, unequal lengths, or a score that is not finite.
    """
    a, b = _array(scores_a), _array(scores_b)
    _check_lengths(a, b, prompts)
    if len(a) == 0:
        raise LoraDpoError("there are no scores to compare")
    for side in (a, b):
        for index in np.flatnonzero(~np.isfinite(side))[:1]:
            raise LoraDpoError(f"the score of an image for {prompts[index]!r} is {side[index]}")
    return _compare(a, b, list(prompts), excluded=0, seed=seed)


def compare_details(
    details_a: Mapping[str, Scores], details_b: Mapping[str, Scores], prompts: Sequence[Hashable], *, seed: int
) -> dict[str, Comparison]:
    """A comparison per named detail over the rows where both sides have a score; p_holm corrects over the details.

    A detail that applies to no row is left out.

    Raises:
        LoraDpoError: the two sides have different names, lengths, or an infinite score.
    """
    if set(details_a) != set(details_b):
        raise LoraDpoError(f"details differ: {sorted(details_a)} against {sorted(details_b)}")
    result: dict[str, Comparison] = {}
    for name in details_a:
        a, b = _array(details_a[name]), _array(details_b[name])
        _check_lengths(a, b, prompts)
        if np.isinf(a).any() or np.isinf(b).any():
            raise LoraDpoError(f"detail {name!r} has an infinite score")
        both = ~(np.isnan(a) | np.isnan(b))
        if both.any():
            kept = [prompt for prompt, keep in zip(prompts, both, strict=True) if keep]
            result[name] = _compare(a[both], b[both], kept, excluded=int((~both).sum()), seed=seed)
    corrected = holm([comparison.p_value for comparison in result.values()])
    return {name: replace(result[name], p_holm=p) for name, p in zip(result, corrected, strict=True)}


def _compare(a: np.ndarray, b: np.ndarray, prompts: list[Hashable], *, excluded: int, seed: int) -> Comparison:
    signs = np.sign(a - b)
    outcomes = (signs + 1) / 2
    groups = len(set(prompts))
    rate, ci95 = float(outcomes.mean()), win_rate_interval(outcomes, prompts, seed=seed)
    # Several images of a prompt are not independent coins: each prompt tosses once, for its majority.
    majority: dict[Hashable, float] = dict.fromkeys(prompts, 0.0)
    for prompt, sign in zip(prompts, signs.tolist(), strict=True):
        majority[prompt] += sign
    return Comparison(
        n=len(a),
        prompts=groups,
        excluded=excluded,
        wins=int((signs > 0).sum()),
        ties=int((signs == 0).sum()),
        losses=int((signs < 0).sum()),
        win_rate=rate,
        ci95=ci95,
        p_value=sign_test(sum(v > 0 for v in majority.values()), sum(v < 0 for v in majority.values())),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        effect=effect(a - b, prompts, seed=seed),
        further_prompts=further_groups(rate, groups, ci95, single=groups == len(a)),
    )


def _array(scores: Scores) -> np.ndarray:
    # One by one: this also takes tensors on another device, of any dtype.
    return np.array([float(score) for score in scores], dtype=np.float64)


def _check_lengths(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable]) -> None:
    if not len(a) == len(b) == len(prompts):
        raise LoraDpoError(f"{len(a)} scores against {len(b)} for {len(prompts)} prompts: one of each per image")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
