"""The engine of every objective on pairs: passes through the network in, the objective's scalars out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo import denoising
from lora_dpo.adapters import Adapters
from lora_dpo.denoising import ErrorSpace
from lora_dpo.families import Conditioning, Family
from lora_dpo.methods import LossParts, Method
from lora_dpo.methods.objectives import Objective, PairErrors
from lora_dpo.methods.stream import PairStream, Part, StepBatch


@final
class PairMethod(Method):
    """An objective on a stream of pairs, with the base model (adapters off) as the reference.

    Args:
        error_space: what an error means for v-prediction; see `denoising.errors`.
        timestep_weights: w(t) of `PairErrors.weight` for each t; None: 1. See `losses.timestep_weights`.
    """

    def __init__(
        self,
        stream: PairStream,
        family: Family,
        adapters: Adapters,
        objective: Objective,
        *,
        error_space: ErrorSpace = "epsilon",
        timestep_weights: Float[Tensor, " T"] | None = None,
    ) -> None:
        self._stream, self._family, self._adapters = stream, family, adapters
        self._first = self.objective = objective
        self._error_space: ErrorSpace = error_space
        self._timestep_weights = timestep_weights

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        return self._stream.batches(start_step)

    def restart(self, lines: Sequence[Mapping[str, float]]) -> None:
        self.objective = self._first
        for line in lines:
            self.see(line)

    def see(self, line: Mapping[str, float]) -> None:
        self.objective = self.objective.after(line)

    def loss(self, part: Part) -> LossParts:
        """Winners and losers go through the network together, the reference first: its activations are gone by then.

        Sums: loss; error_winner; where they are needed, error_loser, ref_error_winner, ref_error_loser, shift_winner
        and shift_loser; where the objective has a margin u, margin, implicit_accuracy (its sign; ties half) and
        gradient_factor (σ(−u): of DPO's gradient, what is left); and what the objective logs itself.
        """
        errors = self._errors(part)
        per_pair = self.objective(errors)
        return LossParts(
            loss=per_pair.sum() / part.batch_pairs,
            per_pair=per_pair.detach(),
            sums=_sums(self.objective, errors, per_pair),
        )

    def _errors(self, part: Part) -> PairErrors:
        needs = self.objective.needs
        both = "loser" in needs
        reference = None
        if needs & {"reference", "shift"}:
            with torch.no_grad(), self._adapters.reference():
                reference = self._residuals(part, both)
        with part.dropout(self._adapters):
            residual = self._residuals(part, both)
        t = torch.cat([part.t] * (1 + both))
        found: dict[str, Tensor] = {}

        def measure(name: str, one: Tensor, other: Tensor) -> None:
            mean = denoising.mean_product(self._family, one, other, t[: len(one)], self._error_space)
            sides = mean.split(len(part))
            found.update({f"{name}{side}": value for side, value in zip(("winner", "loser"), sides, strict=False)})

        measure("", residual, residual)
        if reference is not None and "reference" in needs:
            measure("ref_", reference, reference)
        if reference is not None and "shift" in needs:
            moved = residual - reference
            measure("shift_", moved, moved)
        if "overlap" in needs:
            winner, loser = residual.detach().split(len(part))
            found["overlap"] = denoising.mean_product(self._family, winner, loser, part.t, self._error_space)
        weight = torch.ones_like(found["winner"], requires_grad=False)
        if self._timestep_weights is not None:
            weight = self._timestep_weights.to(part.t.device)[part.t].to(weight)
        return PairErrors(t=part.t, weight=weight, **found)

    def _residuals(self, part: Part, both: bool) -> Float[Tensor, "images c h w"]:
        """Of the winners, then of the losers."""
        if not both:
            x_0, noise, t, conditioning = part.x_0_winner, part.noise, part.t, part.conditioning_winner
        else:
            x_0 = torch.cat([part.x_0_winner, part.x_0_loser])
            noise, t = torch.cat([part.noise, part.noise]), torch.cat([part.t, part.t])
            conditioning: Conditioning = {
                name: torch.cat([value, part.conditioning_loser[name]])
                for name, value in part.conditioning_winner.items()
            }
        return denoising.residuals(self._family, x_0, noise, t, conditioning)


@torch.no_grad()
def _sums(objective: Objective, errors: PairErrors, per_pair: Tensor) -> dict[str, Tensor]:
    logged = {"loss": per_pair}
    margin = objective.margin(errors)
    if margin is not None:
        logged |= {"implicit_accuracy": 0.5 * (torch.sign(margin) + 1), "margin": margin}
    names = {"winner": "error_winner", "loser": "error_loser"}
    names |= {f"ref_{side}": f"ref_{name}" for side, name in names.items()}
    names |= {name: name for name in ("shift_winner", "shift_loser", "overlap")}
    logged |= {named: errors.measured[name] for name, named in names.items() if name in errors.measured}
    if margin is not None:
        logged["gradient_factor"] = torch.sigmoid(-margin)
    logged |= objective.logged(errors)
    return {name: value.detach().sum() for name, value in logged.items()}
