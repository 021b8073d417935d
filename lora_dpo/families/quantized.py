"""A frozen UNet in 8 or 4 bits: the linear layers of its attention blocks, quantised by bitsandbytes on loading.

The weights are rounded and the activations are not: u is β/2 times a difference of errors, and noise of rounded
activations (as LLM.int8() has it) would be noise of u. A layer's weight is restored for the product and dropped after
it, in the backward pass again, so that no restored copy outlives a layer's call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_dpo.errors import UserError

Kind = Literal["none", "int8", "nf4"]
BLOCK = 64
_INSIDE = ".attentions."


def require() -> Any:
    """bitsandbytes' functions.

    Raises:
        UserError: it is missing, or can't be loaded.
    """
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # a broken installation raises whatever its shared library does
        raise UserError(
            f"a quantised base needs bitsandbytes, which can't be imported ({error})",
            where="base.quantization",
            hint='pip install "lora-dpo[bitsandbytes]", or use quantization = "none"',
        ) from error


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is kept as codes; `weight` restores it, in `dtype`.

    int8: each output's weights by their largest absolute value over 127 [LLM.int8(), sec. 2]. nf4: blocks of 64 weights
    by theirs, at the 16 quantiles of a normal distribution, the scales quantised once more [QLoRA, sec. 3].

    Attributes:
        kind: "int8" or "nf4".
        dtype: of the weight that it was made from.
        packed: the codes: int8 [out, in], or uint8 [out · in / 2, 1].
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: Kind, device: torch.device) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        library = require()
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach().to(device)
        if kind == "int8":
            # The library's kernel reads float16. A weight beyond its range would be an infinite scale.
            packed, scale, _ = library.int8_vectorwise_quant(weight.to(torch.float16))
            self.register_buffer("scale", scale / 127)
        else:
            packed, self._state = library.quantize_4bit(
                weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
        self.register_buffer("packed", packed)
        bias = linear.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(device), False))

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The restored weight: a new tensor at every reading."""
        if self.kind == "int8":
            return (self.packed * self.scale.unsqueeze(1)).to(self.dtype)  # the scale in float32: bfloat16 has 8 bits
        return require().dequantize_4bit(self.packed, self._state)

    def forward(self, input: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(input.to(dtype), lambda: self.weight.to(dtype), bias)  # pyright: ignore

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        if self.kind == "nf4":
            self._state.to(self.packed.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """x·Wᵀ + b with W restored when it is needed: autograd would keep it from the forward pass to the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.weight(), None, None


def quantize(unet: nn.Module, kind: Kind, device: torch.device) -> None:
    """Put `QuantizedLinear` in the place of every linear layer in the attention blocks, one at a time.

    The embeddings of time and size, convolutions and norms stay as they are: all outputs depend on the former, and the
    rest is small. A layer is moved to `device` alone, and quantised there.

    Raises:
        UserError: bitsandbytes is missing, or a weight is beyond float16's range.
    """
    library = require()
    if "dynamic" not in library.name2qmap:
        with torch.device("cpu"):  # the library would keep its first table on whatever device that was made for
            library.name2qmap["dynamic"] = library.create_dynamic_map()
    for name in [name for name, module in unet.named_modules() if _wanted(name, module)]:
        parent, _, child = name.rpartition(".")
        owner = unet.get_submodule(parent)
        made = QuantizedLinear(getattr(owner, child), kind, device)
        if kind == "int8" and not made.get_buffer("scale").isfinite().all():
            raise UserError(
                f"{name} has weights that int8 can't hold (beyond ±65504, or not finite)",
                where="base.quantization",
                hint='use quantization = "nf4" or "none"',
            )
        setattr(owner, child, made)


def _wanted(name: str, module: nn.Module) -> bool:
    return _INSIDE in name and type(module) is nn.Linear
