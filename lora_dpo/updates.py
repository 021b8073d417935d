"""A LoRA as what it adds to the weights: read from a file, averaged, resized, applied, merged.

Two adapters are averaged by their updates ΔW = B·A, not by their factors: the mean of B times the mean of A is another
matrix. Sums of low-rank updates are exact in their factors side by side; a truncated singular value decomposition then
gives the nearest update of a smaller rank (Eckart-Young), and its error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import safetensors
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from lora_dpo.errors import UserError

PREFIX = "unet."
_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class Update:
    """ΔW = up · down of one layer, strength included.

    Attributes:
        magnitude: DoRA's, whose weight in effect is magnitude · (W + ΔW) / ‖W + ΔW‖, by output; None for LoRA.
        kernel: shape of the layer's weight without its first axis: (in,), or (in, height, width) of a convolution.
    """

    down: Float[Tensor, "rank n"]
    up: Float[Tensor, "m rank"]
    kernel: tuple[int, ...]
    magnitude: Float[Tensor, " m"] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """ΔW in the shape of the layer's weight."""
        return (self.up @ self.down).reshape(-1, *self.kernel)

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight in effect, float32."""
        whole = weight.detach().float() + self.dense().to(weight.device, torch.float32)
        if self.magnitude is None:
            return whole
        gain = self.magnitude.to(whole) / whole.flatten(1).norm(dim=1)
        return whole * gain.reshape(-1, *(1,) * len(self.kernel))


Updates = dict[str, Update]


def from_state(state: Mapping[str, Tensor], scale: float = 1.0) -> Updates:
    """Of `<module>.lora_A.weight`, `<module>.lora_B.weight` and, for DoRA, `<module>.lora_magnitude_vector`; float64.

    Raises:
        UserError: other keys, or a half of a pair.
    """
    # Some programs write the name that the magnitude has in peft's modules.
    state = {key.removesuffix(".weight") if f"{_MAGNITUDE}.weight" in key else key: t for key, t in state.items()}
    modules = {key.removesuffix(_DOWN) for key in state if key.endswith(_DOWN)}
    strange = set(state) - {f"{module}{part}" for module in modules for part in (_DOWN, _UP, _MAGNITUDE)}
    if strange or not modules:
        shown = ", ".join(sorted(strange)[:3]) or "nothing"
        raise UserError(f"these weights aren't LoRA pairs of the UNet ({shown})")
    updates = {}
    for module in sorted(modules):
        if f"{module}{_UP}" not in state:
            raise UserError(f"{module} has lora_A and no lora_B")
        down, up = state[f"{module}{_DOWN}"].double(), state[f"{module}{_UP}"].double()
        magnitude = state[f"{module}{_MAGNITUDE}"].double().flatten() if f"{module}{_MAGNITUDE}" in state else None
        if down.dim() < 2 or up.shape[1:2] != down.shape[:1] or (magnitude is not None and len(magnitude) != len(up)):
            raise UserError(f"the weights of {module} don't fit each other", hint="the file is damaged")
        updates[module] = Update(down.flatten(1), up.flatten(1) * scale, tuple(down.shape[1:]), magnitude)
    return updates


def to_state(updates: Updates, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The reverse of `from_state`, with scale 1."""
    state = {}
    for module, update in updates.items():
        ones = (1,) * (len(update.kernel) - 1)
        down = update.down.reshape(update.rank, *update.kernel)
        state[f"{module}{_DOWN}"] = down.to(dtype).contiguous()
        state[f"{module}{_UP}"] = update.up.reshape(*update.up.shape, *ones).to(dtype).contiguous()
        if update.magnitude is not None:
            shape = (1, -1, *ones) if ones else (-1,)  # as peft has it
            state[f"{module}{_MAGNITUDE}"] = update.magnitude.reshape(shape).to(dtype).contiguous()
    return state


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its header's strings.

    Raises:
        UserError: no such file, or no safetensors.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't be read as safetensors ({error})", where=path) from None


def of_unet(state: Mapping[str, Tensor], header: Mapping[str, str]) -> Updates:
    """Of the tensors of a file in diffusers' layout.

    Raises:
        UserError: another layout, or adapters of the text encoders.
    """
    others = {key for key in state if not key.startswith(PREFIX)}
    if others:
        raise UserError(f"it holds more than a UNet's LoRA ({min(others)}, …)")
    return from_state({key.removeprefix(PREFIX): t for key, t in state.items()}, _strength(header))


def _strength(header: Mapping[str, str]) -> float:
    """alpha / rank, where a file written by diffusers' own `save_lora_weights` states them; else 1."""
    stated = json.loads(header.get("lora_adapter_metadata", "{}"))
    if stated.get(f"{PREFIX}alpha_pattern") or stated.get(f"{PREFIX}rank_pattern"):
        raise UserError("its layers have strengths of their own", hint="load it into a pipeline and fuse it there")
    if f"{PREFIX}lora_alpha" not in stated:
        return 1.0
    rank, alpha = stated[f"{PREFIX}r"], stated[f"{PREFIX}lora_alpha"]
    return alpha / (math.sqrt(rank) if stated.get(f"{PREFIX}use_rslora") else rank)


def average(parts: Sequence[Updates], weights: Sequence[float]) -> Updates:
    """Σ weight · ΔW, exact: of rank Σ rank. A layer that one part lacks counts as zero there.

    Raises:
        UserError: parts of different base models, or DoRA, of which a mean is no low-rank update with magnitudes.
    """
    if len(parts) == 1 and weights[0] == 1:
        return dict(sorted(parts[0].items()))
    if any(is_dora(updates) for updates in parts):
        raise UserError(
            "DoRA adapters can't be averaged or weighed: the result would be no low-rank update with magnitudes",
            hint="export them one by one, or give LoRA adapters",
        )
    found: dict[str, list[Update]] = {}
    for updates, weight in zip(parts, weights, strict=True):
        for module, update in updates.items():
            found.setdefault(module, []).append(replace(update, up=update.up * weight))
    for module, updates in found.items():
        if len({(update.kernel, len(update.up)) for update in updates}) > 1:
            raise UserError(f"{module} has different sizes", hint="these adapters are of different base models")
    return {
        module: Update(
            torch.cat([u.down for u in updates]), torch.cat([u.up for u in updates], dim=1), updates[0].kernel
        )
        for module, updates in sorted(found.items())
    }


def is_dora(updates: Updates) -> bool:
    return any(update.magnitude is not None for update in updates.values())


@dataclass(frozen=True)
class Resized:
    """Updates of at most a given rank; DoRA's magnitudes stay.

    Attributes:
        error: ‖ΔW' − ΔW‖ / ‖ΔW‖ over all layers, Frobenius.
        worst: the layer with the largest error of its own, and that error.
    """

    updates: Updates
    error: float
    worst: tuple[str, float]


def resize(updates: Updates, rank: int) -> Resized:
    """The nearest update of at most `rank`, layer by layer."""
    small, lost, whole, worst = {}, 0.0, 0.0, ("", -1.0)
    for module, update in updates.items():
        q_up, r_up = torch.linalg.qr(update.up)
        q_down, r_down = torch.linalg.qr(update.down.T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T)
        keep = min(rank, len(s))
        root = s[:keep].sqrt()
        small[module] = replace(update, down=root[:, None] * (v[:keep] @ q_down.T), up=q_up @ u[:, :keep] * root)
        cut, total = s[keep:].square().sum().item(), s.square().sum().item()
        lost, whole = lost + cut, whole + total
        error = math.sqrt(cut / total) if total else 0.0
        if error > worst[1]:
            worst = (module, error)
    return Resized(small, math.sqrt(lost / whole) if whole else 0.0, worst)


@contextmanager
def applied(denoiser: nn.Module, updates: Updates) -> Iterator[None]:
    """Scope in which the layers' outputs have the updates added, computed in float32: what every loader should do.

    Raises:
        UserError: a layer that the denoiser doesn't have, or has in another size.
    """
    layers = _layers(denoiser, updates)
    handles = []
    try:
        for module, layer in layers.items():
            handles.append(layer.register_forward_hook(_adder(updates[module], layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def merge(denoiser: nn.Module, updates: Updates) -> None:
    """The weights in effect into the denoiser's own; they are formed in float32 and rounded to its precision once.

    Raises:
        UserError: a layer that the denoiser doesn't have, or has in another size; nothing is changed then.
    """
    for module, layer in _layers(denoiser, updates).items():
        weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        weight.copy_(updates[module].added_to(weight))


def _adder(update: Update, layer: nn.Module):
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    ends = (1,) * (len(update.kernel) - 1)  # of an output's shape, after its channels
    gain = offset = None
    if update.magnitude is not None:
        whole = weight.detach().float() + update.dense().to(weight.device, torch.float32)
        gain = (update.magnitude.to(whole) / whole.flatten(1).norm(dim=1)).reshape(-1, *ends)
        offset = 0.0 if bias is None else bias.detach().float().reshape(-1, *ends)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        down, up = (part.to(x.device, torch.float32) for part in (update.down, update.up))
        if isinstance(layer, nn.Conv2d):
            shape = (update.rank, *update.kernel)
            inner = functional.conv2d(x, down.reshape(shape), None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore[reportArgumentType]
            changed = output.float() + functional.conv2d(inner, up[:, :, None, None])
        else:
            changed = output.float() + x @ down.T @ up.T
        if gain is not None and offset is not None:
            changed = gain * (changed - offset) + offset
        return changed.to(output.dtype)

    return add


def _layers(denoiser: nn.Module, updates: Updates) -> dict[str, nn.Module]:
    layers, known = {}, dict(denoiser.named_modules())
    for module, update in updates.items():
        layer = known.get(module)
        shape = tuple(getattr(layer, "weight", torch.empty(0)).shape)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or shape != (len(update.up), *update.kernel):
            has = f"is {shape} there" if layer is not None else "is not there"
            raise UserError(
                f"the adapter doesn't fit this base model: {module} {has}, expected {(len(update.up), *update.kernel)}",
                hint="give the base model that it was trained on, with --base",
            )
        layers[module] = layer
    return layers
