"""The tiny world's truth, measured from pixels: what its preferences reward, and each part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo.scorers import Scorer
from lora_dpo.tinyworld import taste
from lora_dpo.tinyworld.verifier import CATEGORIES, Measurement, measure

PARTS: dict[str, Callable[[Measurement], float]] = {
    "alignment": taste.alignment,
    "strict": lambda measured: float(measured.strict),
    "mean": lambda measured: measured.mean,
    "aesthetic": taste.aesthetic,
    "shading": lambda measured: measured.style_shading,
    "object size": lambda measured: measured.size,
    "vividness": lambda measured: measured.vividness,
    "crispness": lambda measured: measured.crispness,
}


@final
class TinyWorldScorer(Scorer):
    """Scores 64×64 pictures for captions of the tiny world's grammar.

    The headline is the utility that the embedded preferences were drawn from, without their noise:
    alignment + aesthetic, 0 … 2. `details` are those two and what they consist of, 0 … 1 each:

    - strict: everything that the caption says is true; mean: the share of it that is;
    - shading, object size, vividness: the parts of the aesthetic, NaN for a picture without objects;
    - crispness: sharp edges on a clean ground, which nothing rewards: a check that the pictures stay intact;
    - shape, colour, texture, size, count, relation, background: whether what the caption says of it is true, NaN where
      it says nothing.

    Raises:
        UserError: pictures of another size, or a prompt outside the grammar.
    """

    name = "tinyworld"

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return torch.tensor([taste.utility(measured) for measured in _measured(images, prompts)], dtype=torch.float32)

    def details(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> dict[str, Float[Tensor, " b"]]:
        measured = _measured(images, prompts)
        columns = {name: [part(one) for one in measured] for name, part in PARTS.items()}
        for category in CATEGORIES:
            facts = [one.facts[category] for one in measured]
            columns[category] = [math.nan if fact is None else float(fact) for fact in facts]
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}


def _measured(images: Tensor, prompts: Sequence[str]) -> list[Measurement]:
    return measure(images.detach().float().cpu().numpy(), prompts)
