"""Optimizers by their libraries, and learning rates as a pure function of the step (nothing of them needs saving)."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lora_dpo.adapted_layers import MAGNITUDE
from lora_dpo.errors import UserError

Kind = Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "schedule_free_adamw"]
Schedule = Literal["constant", "linear", "cosine"]
# Kind → the module that has it, and the extra that installs it.
_LIBRARIES: dict[str, tuple[str, str]] = {
    "adamw8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "paged_adamw8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "lion8bit": ("bitsandbytes.optim", "bitsandbytes"),
    "adafactor": ("transformers.optimization", ""),
    "prodigy": ("prodigyopt", "prodigy"),
    "schedule_free_adamw": ("schedulefree", "schedulefree"),
}


def require(kind: Kind, device: torch.device) -> Any:
    """The optimizer's library, imported; None for torch's own. Call it before hours of work.

    Raises:
        UserError: the library is missing or broken, or the optimizer needs another device.
    """
    if kind == "paged_adamw8bit" and device.type != "cuda":
        raise UserError(
            f"paged_adamw8bit moves its state between a GPU's memory and the machine's; this is {device.type}",
            where="train.optimizer",
            hint='use optimizer = "adamw8bit"',
        )
    if kind not in _LIBRARIES:
        return None
    module, extra = _LIBRARIES[kind]
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever its shared library does
        raise UserError(
            f"{kind} needs {module.partition('.')[0]}, which can't be imported ({error})",
            where="train.optimizer",
            hint=f'pip install "lora-dpo[{extra}]", or use optimizer = "adamw"',
        ) from error


def build(
    kind: Kind,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimizer over `parameters` in their order, at just this learning rate.

    The 8-bit ones are bitsandbytes' block-wise ones; tensors of fewer than 4,096 elements keep 32-bit moments.
    "lion8bit" takes its second β from Lion (0.99; Chen et al. 2023). "adafactor" has a fixed rate: neither its relative
    steps nor its scaling by the weights' size, which would hold B = 0 back. "prodigy" finds the step size itself
    (Mishchenko and Defazio 2023): the rate is its multiplier, normally 1; bias correction and the safeguard for
    warm-up are on, as its authors advise for diffusion models. "schedule_free_adamw" (Defazio et al. 2024) trains one
    point and offers the mean of its path: see `evaluation_weights`.

    Raises:
        UserError: the library is missing, or the optimizer can't work on the parameters' device.
    """
    library = require(kind, next(iter(parameters.values())).device)
    weights = _groups(parameters)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    match kind:
        case "adamw":
            return torch.optim.AdamW(weights, betas=betas, eps=eps, **options)
        case "adamw8bit":
            return library.AdamW8bit(weights, betas=betas, eps=eps, **options)
        case "paged_adamw8bit":
            return library.PagedAdamW8bit(weights, betas=betas, eps=eps, **options)
        case "lion8bit":
            return library.Lion8bit(weights, betas=(betas[0], 0.99), **options)
        case "adafactor":
            return library.Adafactor(weights, scale_parameter=False, relative_step=False, **options)
        case "prodigy":
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
                return library.Prodigy(weights, betas=betas, use_bias_correction=True, safeguard_warmup=True, **options)
        case "schedule_free_adamw":
            optimizer = library.AdamWScheduleFree(weights, betas=betas, eps=eps, **options)
            optimizer.train()
            return optimizer


def _groups(parameters: Mapping[str, nn.Parameter]) -> list[Any]:
    """The weights; or, where some should not decay, two groups of them.

    Decay takes a LoRA towards the base. A magnitude of DoRA would go towards an output of zero.
    """
    kept = [parameter for name, parameter in parameters.items() if name.endswith(MAGNITUDE)]
    if not kept:
        return list(parameters.values())
    decaying = [parameter for name, parameter in parameters.items() if not name.endswith(MAGNITUDE)]
    return [{"params": decaying}, {"params": kept, "weight_decay": 0.0}]


@contextlib.contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Scope in which the parameters have the values that are to be used; training goes on from the exact old ones.

    They differ for schedule-free optimizers only, whose switch there and back would round.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters] if is_schedule_free(optimizer) else []
    modes = [group.get("train_mode") for group in optimizer.param_groups]
    use_evaluation_weights(optimizer)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=False):
            parameter.data.copy_(value)
        for group, mode in zip(optimizer.param_groups, modes, strict=True):
            if mode is not None:
                group["train_mode"] = mode


def use_evaluation_weights(optimizer: torch.optim.Optimizer) -> None:
    """As `evaluation_weights`, for good: training is over."""
    if is_schedule_free(optimizer):
        optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "schedulefree"


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
