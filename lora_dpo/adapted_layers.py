"""One layer of the denoiser with LoRA beside it, computed in the precision of the base.

peft puts the layers in and holds their weights; the pass is computed here. peft's own pass copies a layer's input to
the adapter's float32, and autograd keeps the copy for the gradient of A: one of an activation's size for each of SDXL's
560 attention layers. Here the weights are cast instead, which are small, and the base's own activation is kept.
"""

from __future__ import annotations

import copy
from typing import Any, cast, final

import torch
from jaxtyping import Float
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from lora_dpo.errors import UserError

POLICY, REFERENCE = "lora_dpo", "lora_dpo_reference"
PARTS, MAGNITUDE = ("lora_A", "lora_B"), "lora_magnitude_vector"


class Switch:
    """Which adapter the layers that share it use: its name, or None for the plain base.

    One assignment switches all of them.
    """

    def __init__(self) -> None:
        self.active: str | None = POLICY


class Magnitude(nn.Module):
    """DoRA's m of one layer, where peft keeps it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapted(nn.Module):
    """base(x) + (scale·B)·A·x, in the precision of base(x); with DoRA, the same with each output's weights rescaled.

    Mixed into peft's layers, whose weights it uses: float32, cast in the pass, so that gradients reach the float32
    weights. The strength is multiplied into B before the cast, as it is in an exported file: in half precision too, the
    pass is what a stock pipeline computes from that file.

    DoRA (Liu et al. 2024, eq. 5): the weight is m·V/‖V‖ with V = W + scale·B·A, the norm over each output's weights. It
    is a constant for the gradient (their section 4.3). The rescaling is computed as base + change + (m/‖V‖ − 1)·(…), so
    that with B = 0 and m = ‖W‖ the output is the base's bit for bit. Dropout acts on the change alone, where peft and
    the paper's code drop the base's input for the rescaling too, in a second pass of the base.
    """

    switch: Switch
    base_layer: nn.Module
    base_squares: Tensor
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ModuleDict
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
        down, up = self.factors(name)
        change = self.product(x, down.to(result.dtype), up.to(result.dtype))
        if name not in self.lora_magnitude_vector:
            return result + change
        magnitude = self.weights(name)[MAGNITUDE]
        gain = (magnitude / self.norms(name).view_as(magnitude) - 1).to(result.dtype)
        bias = cast(Tensor | None, self.base_layer.bias)
        unbiased = result if bias is None else result - bias.view_as(magnitude).to(result.dtype)
        return result + change + gain * (unbiased + change)

    def weights(self, name: str = POLICY) -> dict[str, nn.Parameter]:
        """The float32 weights, by the ends of their names in a file."""
        found = {f"{part}.weight": getattr(self, part)[name].weight for part in PARTS}
        if name in self.lora_magnitude_vector:
            found[MAGNITUDE] = cast(Magnitude, self.lora_magnitude_vector[name]).weight
        return found

    def factors(self, name: str = POLICY) -> tuple[Tensor, Tensor]:
        """A, and B with the strength in it."""
        down, up = (getattr(self, part)[name].weight for part in PARTS)
        scale = self.scaling[name]
        return down, up if scale == 1 else up * scale

    def keep_as(self, name: str) -> None:
        """A frozen copy of the policy's weights as they are now."""
        for part in (*PARTS, MAGNITUDE):
            held: nn.ModuleDict = getattr(self, part)
            if POLICY in held:
                held[name] = copy.deepcopy(held[POLICY]).requires_grad_(False)
        self.scaling[name] = self.scaling[POLICY]

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """up·(down·x) for the layer's kind of product."""
        return functional.linear(functional.linear(x, down), up)

    @torch.no_grad()
    def decompose(self) -> None:
        """Make it DoRA, with m = ‖V‖, whatever V is now."""
        weight = cast(Tensor, self.base_layer.weight)
        squares = weight.detach().flatten(1).float().square().sum(1)
        if not squares.is_meta and squares.eq(0).any():
            raise UserError(
                "DoRA rescales weights, and some outputs here have none but zeros",
                hint="leave this layer out of adapter.targets, or give dora = false",
            )
        self.register_buffer("base_squares", squares, persistent=False)
        shape = (1, -1, *(1,) * (weight.dim() - 2)) if weight.dim() > 2 else (-1,)
        lengths = squares if squares.is_meta else self.norms()
        self.lora_magnitude_vector[POLICY] = Magnitude(lengths.view(shape))

    @torch.no_grad()
    def norms(self, name: str = POLICY) -> Float[Tensor, " out"]:
        """‖V‖ = ‖W + scale·B·A‖ of each output's weights, float32."""
        crossed, own = self._products(name)
        return (self.base_squares + 2 * crossed + own).clamp_min(0).sqrt()

    @torch.no_grad()
    def squared_change(self) -> Float[Tensor, ""]:
        """‖W' − W‖² of the weight W' that the policy has in effect."""
        if POLICY not in self.lora_magnitude_vector:
            down, up = (part.flatten(1) for part in self.factors())
            # ‖BA‖² = tr(BᵀB · AAᵀ): rank × rank, the update itself is never formed.
            return ((up.T @ up) * (down @ down.T)).sum()
        gain = self.weights()[MAGNITUDE].flatten() / self.norms()
        crossed, own = self._products(POLICY)
        return ((gain - 1).square() * self.base_squares + 2 * (gain - 1) * gain * crossed + gain.square() * own).sum()

    def _products(self, name: str) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """⟨W, ΔW⟩ and ‖ΔW‖² of each output's weights, with ΔW = scale·B·A, which is never formed."""
        weight = cast(Tensor, self.base_layer.weight).flatten(1)
        with torch.autocast(weight.device.type, enabled=False):
            down, up = (part.flatten(1) for part in self.factors(name))
            crossed = (weight @ down.to(weight.dtype).T).float() * up
            return crossed.sum(1), (up @ (down @ down.T) * up).sum(1)


@final
class AdaptedLinear(Adapted, lora.Linear):
    """On a linear layer, bitsandbytes' quantised ones among them: the base is called, and with DoRA its weight read."""


@final
class AdaptedConv2d(Adapted, lora.Conv2d):
    """On a convolution: A has its kernel, stride and padding, B is 1 × 1."""

    def product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        kind: nn.Conv2d = self.lora_A[POLICY]  # pyright: ignore[reportAssignmentType]
        return functional.conv2d(functional.conv2d(x, down, None, kind.stride, kind.padding), up)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}
