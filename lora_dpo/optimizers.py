"""AdamW in 32 or 8 bits, and learning rates as a pure function of the step (nothing of them needs saving)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from lora_dpo.errors import UserError

Kind = Literal["adamw", "adamw8bit"]
Schedule = Literal["constant", "linear", "cosine"]


def build(
    kind: Kind,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimizer over `parameters` in their order.

    "adamw8bit" is bitsandbytes' block-wise 8-bit AdamW; tensors of fewer than 4,096 elements keep 32-bit moments.

    Raises:
        UserError: adamw8bit without a working bitsandbytes.
    """
    options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    match kind:
        case "adamw":
            return torch.optim.AdamW(parameters.values(), **options)
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except Exception as error:  # a broken installation raises whatever its shared library does
                raise UserError(
                    f"adamw8bit needs bitsandbytes, which can't be imported ({error})",
                    where="train.optimizer",
                    hint='pip install "lora-dpo[adamw8bit]", or use optimizer = "adamw"',
                ) from error
            return AdamW8bit(parameters.values(), **options)


def learning_rate_at(
    step: int, *, schedule: Schedule, learning_rate: float, steps: int, warmup_steps: int = 0
) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    Warm-up is linear and its first step already moves: (step + 1) / (warmup_steps + 1) of the full rate. After it
    the rate is constant, or falls along a line or half a cosine, to reach 0 at `steps` (one past the last step).
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    left = max(steps - step, 0) / max(steps - warmup_steps, 1)
    match schedule:
        case "constant":
            return learning_rate
        case "linear":
            return learning_rate * left
        case "cosine":
            return learning_rate * 0.5 * (1 - math.cos(math.pi * left))
