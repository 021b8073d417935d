"""Gradient checkpointing: which blocks keep their input only, and compute their activations again in backward.

A block is a ResNet or a transformer block of the UNet; diffusers checkpoints the same ones. They differ in what they
keep per floating-point operation that computing it again takes. In MiB per GFLOP, on SDXL's UNet with LoRA on attention
in bfloat16, transformer blocks keep 1.8 at width 640 and 0.9 at 1280; ResNets 0.7 at width 320, 0.4 at 640 and 0.2 at
1280; and SD 1.5's transformer blocks of width 320 keep 3.6 (counted under fake tensors). So transformer blocks come
before ResNets, and narrow ones before wide ones. Among equals those at the network's beginning come first: they are
computed again when most of the others' activations are gone already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_dpo.errors import UserError

Policy = Literal["none", "full"] | int
_STAGES = ("down_blocks", "mid_block", "up_blocks")


def blocks(denoiser: nn.Module) -> list[nn.Module]:
    """All blocks, those first whose activations are best computed again."""
    found = [(name, block) for name, block in denoiser.named_modules() if _width(block) is not None]

    def order(named: tuple[str, nn.Module]) -> tuple[bool, int, int]:
        name, block = named
        stage = name.partition(".")[0]
        return isinstance(block, ResnetBlock2D), _width(block) or 0, _STAGES.index(stage) if stage in _STAGES else 0

    return [block for _, block in sorted(found, key=order)]


def recompute(denoiser: nn.Module, policy: Policy) -> int:
    """Make passes with a gradient keep the inputs of so many blocks only, of the others everything.

    Passes without a gradient are as they were; the gradient is the same to the bit. What an earlier call chose is
    undone.

    Args:
        policy: how many of `blocks`; "none"; "full": all.

    Returns:
        how many there are now.

    Raises:
        UserError: more blocks than the network has.
    """
    every = blocks(denoiser)
    for block in every:
        block.__dict__.pop("forward", None)
    count = policy if isinstance(policy, int) else len(every) if policy == "full" else 0
    if count > len(every) or (policy == "full" and not every):
        raise UserError(
            f"got {count}, and this network has {len(every)} blocks",
            where="train.gradient_checkpointing",
            hint='give fewer, or "full" for all of them',
        )
    for block in every[:count]:
        block.forward = partial(_again, block.forward)
    return count


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _width(block: nn.Module) -> int | None:
    if isinstance(block, BasicTransformerBlock):
        return block.dim
    return block.out_channels if isinstance(block, ResnetBlock2D) else None
