"""Objectives of the margin u, the difference of the pair's implicit rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo.methods import losses
from lora_dpo.methods.objectives.base import Need, Objective, PairErrors


@dataclass(frozen=True)
class OfMargin(Objective):
    """A loss of u, and what may be added to any of them.

    Args:
        beta: the published code's β (see `losses`); with `auto`, of the present step.
        safeguard: μ of `losses.safeguard`, which limits the losers' gradients; None: they are left alone.
        anchor_weight: of `losses.anchor_term`, which costs where the winner is worse than under the reference.
        sft_weight: of `losses.sft_term`, the winner's error.
        auto: β follows the pairs' mean |m| (`losses.auto_beta`), known from the steps before.
        gap: smoothed mean |m| of the steps before.
    """

    beta: float
    safeguard: float | None = None
    anchor_weight: float = 0.0
    sft_weight: float = 0.0
    auto: bool = False
    gap: float = 0.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"loser", "reference"} if self.safeguard is None else {"loser", "reference", "overlap"})

    @abstractmethod
    def of(self, u: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """The loss of u, where the winner is the better one with probability `label`."""

    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        if self.safeguard is not None:
            errors = errors.replaced(loser=losses.with_gradient_scaled(errors.loser, self._share(errors)))
        loss = self.of(self.margin(errors), errors.label)
        if self.anchor_weight:
            loss = loss + self.anchor_weight * losses.anchor_term(errors.winner, errors.ref_winner, self.beta)
        if self.sft_weight:
            loss = loss + self.sft_weight * losses.sft_term(errors.winner, self.beta)
        return loss

    def margin(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        return losses.margin(*errors.four, self.beta, errors.weight)

    def logged(self, errors: PairErrors) -> dict[str, Float[Tensor, " pair"]]:
        found = {}
        if self.safeguard is not None:
            found["loser_gradient"] = self._share(errors)
        if self.auto:
            found["gap"] = losses.margin(*errors.four, 2.0, errors.weight).abs()
            found["beta"] = torch.full_like(found["gap"], self.beta)
        return found

    def after(self, line: Mapping[str, float]) -> OfMargin:
        if not self.auto:
            return self
        gap = losses.smoothed_gap(self.gap, line["gap"])
        return replace(self, gap=gap, beta=losses.auto_beta(gap))

    def _share(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        assert self.safeguard is not None
        return losses.safeguard(errors.winner, errors.overlap, self.safeguard)


@final
@dataclass(frozen=True)
class Dpo(OfMargin):
    """Diffusion-DPO (Wallace et al. 2023, eq. 14): −log σ(u).

    Args:
        label_smoothing: ε of conservative DPO: labels are taken for right with probability 1 − ε.
        label_noise: ε of robust DPO: a share ε of the labels is wrong, and the loss is corrected for it.
    """

    label_smoothing: float = 0.0
    label_noise: float = 0.0

    def of(self, u: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return losses.cross_entropy(u, losses.debiased(losses.smoothed(label, self.label_smoothing), self.label_noise))


@final
@dataclass(frozen=True)
class Ipo(OfMargin):
    """IPO: (u − ½)²."""

    def of(self, u: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return losses.ipo(u, label)


@final
@dataclass(frozen=True)
class Hinge(OfMargin):
    """max(0, 1 − u)."""

    def of(self, u: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return losses.hinge(u, label)


@final
@dataclass(frozen=True)
class Dmpo(OfMargin):
    """DMPO: KL(Bernoulli(σ(u)) ‖ Bernoulli(1 − α))."""

    alpha: float = 0.01

    def of(self, u: Float[Tensor, " pair"], label: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return losses.dmpo(u, self.alpha, label)
