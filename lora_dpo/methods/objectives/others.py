"""Objectives beside those of the margin: SFT, KTO, MaPO, DSPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo.methods import losses
from lora_dpo.methods.objectives.base import Need, Objective, PairErrors


@final
@dataclass(frozen=True)
class Sft(Objective):
    """Supervised fine-tuning on the winners, the baseline of section 5.5: their denoising error."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return losses.sft(errors.winner)


@final
@dataclass(frozen=True)
class Kto(Objective):
    """Diffusion-KTO: winners are desirable images, losers undesirable ones; each has a draw of its own.

    A pair's loss is the mean of its two images'. The reference point z is the mean gain over *all* images of the step
    before, clamped at 0: known before the step begins, on all processes, it depends neither on the micro-batch nor on
    the number of processes, costs no further pass, and a resumed run has the same from its metrics. The paper takes
    the present batch's; both estimate the same divergence, one optimizer step apart, and both are 0 at the first step.

    Args:
        beta: as DPO's (the published β is half of it).
        desirable_weight, undesirable_weight: λ_y.
        reference_point: z of the present step.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"loser", "reference"})

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: float = 0.0

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        gain = torch.cat([errors.ref_winner - errors.winner, errors.ref_loser - errors.loser])
        desirable = torch.arange(len(gain), device=gain.device) < len(errors.winner)
        winner, loser = losses.kto(
            gain,
            desirable,
            self.reference_point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        ).chunk(2)
        return (winner + loser) / 2

    def margin(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return losses.margin(*errors.four, self.beta)

    def logged(self, errors: PairErrors) -> dict[str, Float[Tensor, " pair"]]:
        return {"reference_point": torch.full_like(errors.winner, self.reference_point)}

    def after(self, line: Mapping[str, float]) -> Kto:
        gains = line["ref_error_winner"] - line["error_winner"] + line["ref_error_loser"] - line["error_loser"]
        return replace(self, reference_point=losses.reference_point(gains / 2))


@final
@dataclass(frozen=True)
class Mapo(Objective):
    """MaPO, without a reference: the winner's error, and odds of winner against loser.

    Args:
        odds_weight: the paper's β.
        odds_scale: s of φ(e) = s·e/(exp(s·e) − 1).
        timesteps: T of the schedule.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"loser"})

    odds_weight: float = 0.1
    odds_scale: float = 0.5
    timesteps: int = 1000

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return losses.mapo(
            errors.winner, errors.loser, beta=self.odds_weight, snr=self.odds_scale, timesteps=self.timesteps
        )


@final
@dataclass(frozen=True)
class Dspo(Objective):
    """DSPO: the winner's error against a target that moves away from the reference while the pair is undecided.

    Args:
        beta: of u, as DPO's.
        strength: how far the target moves, at most.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"loser", "reference", "shift"})

    beta: float
    strength: float = 0.001

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        u = self.margin(errors)
        return losses.dspo(errors.winner, errors.ref_winner, errors.shift_winner, u, self.strength)

    def margin(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return losses.margin(*errors.four, self.beta, errors.weight)
