"""A method is a stream of batches plus a loss; `train.py`'s one loop trains them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lora_dpo.methods.stream import Part, StepBatch

# Makes the scope of one pass through the network: torch's autocast, for instance.
PassScope = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class LossParts:
    """What one part of an optimizer step adds to it.

    Attributes:
        loss: the sum of the part's pair losses over the pairs of the whole step; the parts' gradients add up to the
            step's.
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
        """With its graph. Deterministic: the same part, weights and lines seen give the same loss."""

    def backward(self, part: Part, pass_scope: PassScope = nullcontext) -> LossParts:
        """Add the part's gradient to the parameters'; the loss that is returned has no use for its graph any more."""
        with pass_scope():
            parts = self.loss(part)
        parts.loss.backward()
        return parts

    def restart(self, lines: Sequence[Mapping[str, float]]) -> None:  # noqa: B027
        """Training begins, resumes or goes back, with these lines of `metrics.jsonl` behind it."""

    def see(self, line: Mapping[str, float]) -> None:  # noqa: B027
        """An optimizer step was made, and this is its line: the same on all processes."""


__all__ = ["LossParts", "Method", "Part", "PassScope", "StepBatch"]
