"""Supervised fine-tuning on the winners: the baseline of section 5.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from lora_dpo import denoising
from lora_dpo.adapters import Adapters
from lora_dpo.denoising import ErrorSpace
from lora_dpo.families import Family
from lora_dpo.methods import LossParts, Method, losses
from lora_dpo.methods.stream import PairStream, Part, StepBatch


@final
class SFT(Method):
    """The denoising error of the winners; losers and the reference play no part."""

    def __init__(
        self, stream: PairStream, family: Family, adapters: Adapters, *, error_space: ErrorSpace = "epsilon"
    ) -> None:
        self._stream, self._family, self._adapters = stream, family, adapters
        self._error_space: ErrorSpace = error_space

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        return self._stream.batches(start_step)

    def loss(self, part: Part) -> LossParts:
        """Sums: loss, error_winner."""
        with part.dropout(self._adapters):
            error_winner = denoising.errors(
                self._family, part.x_0_winner, part.noise, part.t, part.conditioning_winner, self._error_space
            )
        per_pair = losses.sft(error_winner)
        return LossParts(
            loss=per_pair.sum() / part.batch_pairs,
            per_pair=per_pair.detach(),
            sums={"loss": per_pair.detach().sum(), "error_winner": error_winner.detach().sum()},
        )
