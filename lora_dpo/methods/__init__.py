"""A method is a stream of batches plus a loss; `train.py`'s one loop trains them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lora_dpo.methods.stream import Part, StepBatch


@dataclass(frozen=True)
class LossParts:
    """What one part of an optimizer step adds to it.

    Attributes:
        loss: the sum of the part's pair losses over the pairs of the whole step, with its graph; the parts' gradients
            add up to the step's.
        per_pair: each pair's loss, without a graph.
        sums: sums over the part's pairs of everything that is logged; the step's mean is their total over its pairs.
    """

    loss: Float[Tensor, ""]
    per_pair: Float[Tensor, " pair"]
    sums: dict[str, Float[Tensor, ""]]


class Method(ABC):
    """An objective: where its draws come from, and the loss of given draws."""

    @abstractmethod
    def batches(self, start_step: int) -> Iterator[StepBatch]:
        """The optimizer steps' batches from `start_step` on, without end. All randomness enters here."""

    @abstractmethod
    def loss(self, part: Part) -> LossParts:
        """Deterministic: the same part and weights give the same loss."""


__all__ = ["LossParts", "Method", "Part", "StepBatch"]
