"""Diffusion-DPO: the paper's method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from lora_dpo import denoising
from lora_dpo.adapters import Adapters
from lora_dpo.denoising import ErrorSpace
from lora_dpo.families import Family
from lora_dpo.methods import LossParts, Method, losses
from lora_dpo.methods.stream import PairStream, Part, StepBatch


@final
class DPO(Method):
    """−log σ of the implicit reward's difference, with the base model (adapters off) as the reference.

    Args:
        beta: the published code's β (see `losses`).
        error_space: what an error means for v-prediction; see `denoising.errors`.
    """

    def __init__(
        self,
        stream: PairStream,
        family: Family,
        adapters: Adapters,
        *,
        beta: float,
        error_space: ErrorSpace = "epsilon",
    ) -> None:
        self._stream, self._family, self._adapters = stream, family, adapters
        self._beta = beta
        self._error_space: ErrorSpace = error_space

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        return self._stream.batches(start_step)

    def loss(self, part: Part) -> LossParts:
        """Winner and loser go through the network together, the reference first: its activations are gone by then.

        Sums: loss, implicit_accuracy (the sign of the margin; ties half), margin (u), error_winner, error_loser,
        ref_error_winner, ref_error_loser, gradient_factor (σ(−u): how much of the pair's gradient is left).
        """
        x_0 = torch.cat([part.x_0_winner, part.x_0_loser])
        noise, t = torch.cat([part.noise, part.noise]), torch.cat([part.t, part.t])
        conditioning = {
            name: torch.cat([value, part.conditioning_loser[name]]) for name, value in part.conditioning_winner.items()
        }

        def both() -> tuple[Tensor, ...]:
            return denoising.errors(self._family, x_0, noise, t, conditioning, self._error_space).split(len(part))

        with torch.no_grad(), self._adapters.reference():
            ref_error_winner, ref_error_loser = both()
        with part.dropout(self._adapters):
            error_winner, error_loser = both()
        errors = (error_winner, error_loser, ref_error_winner, ref_error_loser)
        per_pair = losses.dpo(*errors, self._beta)
        with torch.no_grad():
            margin = losses.margin(*errors, self._beta)
            accuracy = 0.5 * (torch.sign(margin) + 1)
        logged = {
            "loss": per_pair,
            "implicit_accuracy": accuracy,
            "margin": margin,
            "error_winner": error_winner,
            "error_loser": error_loser,
            "ref_error_winner": ref_error_winner,
            "ref_error_loser": ref_error_loser,
            "gradient_factor": torch.sigmoid(-margin),
        }
        return LossParts(
            loss=per_pair.sum() / part.batch_pairs,
            per_pair=per_pair.detach(),
            sums={name: value.detach().sum() for name, value in logged.items()},
        )
