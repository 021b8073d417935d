"""One layer of the denoiser with LoRA beside it, computed in the precision of the base.

peft puts the layers in and holds their weights; the pass is computed here. peft's own pass copies a layer's input to
the adapter's float32, and autograd keeps the copy for the gradient of A: one of an activation's size for each of SDXL's
560 attention layers. Here the weights are cast instead, which are small, and the base's own activation is kept.
"""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

POLICY, REFERENCE = "lora_dpo", "lora_dpo_reference"
PARTS = ("lora_A", "lora_B")


class Switch:
    """Which adapter the layers that share it use: its name, or None for the plain base.

    One assignment switches all of them.
    """

    def __init__(self) -> None:
        self.active: str | None = POLICY


class Adapted(nn.Module):
    """base(x) + (scale·B)·A·x, in the precision of base(x).

    Mixed into peft's layers, whose weights it uses: float32, cast in the pass, so that gradients reach the float32
    weights. The strength is multiplied into B before the cast, as it is in an exported file: in half precision too, the
    pass is what a stock pipeline computes from that file.
    """

    switch: Switch
    base_layer: nn.Module
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # The base would cast it for itself, and the adapter again.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x, *args, **kwargs)
        name = self.switch.active
        if name is None or self.disable_adapters:
            return result
        x = x.to(result.dtype)
        if name == POLICY:
            x = self.lora_dropout[name](x)
        down, up = (self.weight_of(part, name) for part in PARTS)
        scale = self.scaling[name]
        up = up if scale == 1 else up * scale
        return result + self.product(x, down.to(result.dtype), up.to(result.dtype))

    def weight_of(self, part: str, name: str = POLICY) -> nn.Parameter:
        """Of `lora_A` or `lora_B`."""
        return getattr(self, part)[name].weight

    def keep_as(self, name: str) -> None:
        """A frozen copy of the policy's weights as they are now."""
        for part in PARTS:
            weights: nn.ModuleDict = getattr(self, part)
            weights[name] = copy.deepcopy(weights[POLICY]).requires_grad_(False)
        self.scaling[name] = self.scaling[POLICY]

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up·(down·x) for the layer's kind of product."""
        return functional.linear(functional.linear(x, down), up)


@final
class AdaptedLinear(Adapted, lora.Linear):
    """On a linear layer, bitsandbytes' quantised ones among them: the base is only called."""


@final
class AdaptedConv2d(Adapted, lora.Conv2d):
    """On a convolution: A has its kernel, stride and padding, B is 1 × 1."""

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        kind: nn.Conv2d = self.lora_A[POLICY]  # pyright: ignore[reportAssignmentType]
        return functional.conv2d(functional.conv2d(x, down, None, kind.stride, kind.padding), up)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}
