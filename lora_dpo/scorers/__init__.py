"""What an image is worth, given its prompt: one interface, whatever measures it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


class Scorer(ABC):
    """Higher is better. Deterministic: the same image and prompt have the same score, whatever else is in the batch."""

    name: str

    @abstractmethod
    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The headline score of each image (in [0, 1]) for its prompt, float32 on the CPU."""

    @abstractmethod
    def details(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " b"]]:
        """Named parts of the judgement; NaN where a part does not apply to a prompt. Empty if there are none."""
