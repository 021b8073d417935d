"""An objective: what a pair costs, given what was measured on it. A frozen value without a model, device or recipe.

An objective reads per-pair scalars only, so one engine (`pairs.PairMethod`) trains them all, in one pass over both
images or one image at a time, and reference errors can be stored. The formulas themselves are in `losses`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from lora_dpo.errors import LoraDpoError

Need = Literal["loser", "reference", "shift", "overlap"]


class PairErrors:
    """What one draw (t, ε) of each pair measures; float32, one number per pair. All means are over c, h, w.

    Reading what the objective's `needs` doesn't name is an error.

    Attributes:
        t: the draw's timestep.
        weight: w(t), which multiplies the margin inside the sigmoid; 1 for the constant weighting of the paper's code.
        label: the probability that the winner is the better one: 1 where someone decided, ½ for a tie.
        winner, loser: the policy's errors, mean (ε_θ − ε)². `loser` if needed.
        ref_winner, ref_loser: the reference's, with "reference"; they have no gradient.
        shift_winner, shift_loser: mean (ε_θ − ε_ref)², with "shift": how far the policy moved from the reference.
            With the errors they give the product of the residual r = ε_θ − ε and the move d = ε_θ − ε_ref too:
            mean r·d = (error + shift − ref_error)/2.
        overlap: mean (ε_θ − ε)_winner · (ε_θ − ε)_loser, with "overlap"; it has no gradient.
    """

    t: Int[Tensor, " pair"]
    weight: Float[Tensor, " pair"]
    label: Float[Tensor, " pair"]
    winner: Float[Tensor, " pair"]
    loser: Float[Tensor, " pair"]
    ref_winner: Float[Tensor, " pair"]
    ref_loser: Float[Tensor, " pair"]
    shift_winner: Float[Tensor, " pair"]
    shift_loser: Float[Tensor, " pair"]
    overlap: Float[Tensor, " pair"]

    def __init__(self, **measured: Tensor) -> None:
        if unknown := set(measured) - set(type(self).__annotations__):
            raise LoraDpoError(f"no such measurement: {', '.join(sorted(unknown))}")
        self.__dict__.update(measured)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"{name} was not measured: the objective's `needs` doesn't ask for it")

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the functions of `losses` take them: winner, loser, ref_winner, ref_loser."""
        return self.winner, self.loser, self.ref_winner, self.ref_loser

    @property
    def measured(self) -> Mapping[str, Tensor]:
        return self.__dict__

    def replaced(self, **measured: Tensor) -> PairErrors:
        return PairErrors(**{**self.__dict__, **measured})


class Objective(ABC):
    """A frozen dataclass of its parameters."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What is measured beside the winner's error.

        "shift" and "overlap" keep predictions, not errors alone: with "shift" the reference's can't come from a cache.
        """

    @abstractmethod
    def __call__(self, errors: PairErrors) -> Float[Tensor, " pair"]:
        """Each pair's loss."""

    def margin(self, errors: PairErrors) -> Float[Tensor, " pair"] | None:
        """For the metrics: u > 0 where the policy prefers the winner more than it did; None: there is no such u."""
        return None

    def logged(self, errors: PairErrors) -> dict[str, Float[Tensor, " pair"]]:
        """More numbers for the metrics, by their names there."""
        return {}

    def after(self, line: Mapping[str, float]) -> Objective:
        """The objective of the next step, given this step's means: how a parameter adapts.

        A pure function, so that a resumed run, which goes through all lines again, arrives at the same. `line` has
        what `metrics.jsonl` has, `logged` included.
        """
        return self
