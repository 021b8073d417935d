"""Training that starts from an existing adapter: its update in a fresh adapter's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_dpo.adapted_layers import MAGNITUDE
from lora_dpo.adapters import Adapters
from lora_dpo.errors import UserError
from lora_dpo.updates import Update, Updates, is_dora

KEY = "adapter.start"


def start_from(adapters: Adapters, updates: Updates, place: Path | str) -> int:
    """Give freshly attached adapters the updates: their policy is then the base with that adapter, to rounding.

    A layer's rank may be larger than the update's: further rows of A keep their random start, further columns of B stay
    zero, and add nothing until they are trained. Scales may differ; B takes up the difference. DoRA
    may go on from LoRA: its magnitudes are the adapted weights' lengths then.

    Args:
        place: where the updates are from, for messages.

    Returns:
        How many layers have no update there, and so start as the base.

    Raises:
        UserError: a rank that is too large, a layer that isn't adapted or has another size, or DoRA for an adapter that
            is LoRA; nothing is changed then.
    """
    rank = max(update.rank for update in updates.values())
    if rank > adapters.rank:
        raise UserError(
            f"it has rank {rank}, and adapter.rank is {adapters.rank}",
            where=f"{KEY} = {place}",
            hint=f"give rank = {rank} or more, or a smaller adapter: lora-dpo export {place} --rank {adapters.rank} "
            "--out FOLDER",
        )
    if is_dora(updates) and not adapters.is_dora:
        raise UserError(
            "it is DoRA: it rescales weights, which is no low-rank update",
            where=f"{KEY} = {place}",
            hint="give adapter.dora = true",
        )
    if outside := [name for name in updates if name not in adapters.layers]:
        raise UserError(
            f"{len(outside)} of its {len(updates)} layers are not in adapter.targets ({_some(outside)})",
            where=f"{KEY} = {place}",
            hint="give targets that have them too",
        )
    weights = adapters.parameters()
    other = [name for name, update in updates.items() if _shape(update) != _sizes(weights, name)]
    if other:
        name = other[0]
        raise UserError(
            f"{len(other)} of its {len(updates)} layers have other sizes than the base's: {name} is of "
            f"{_shape(updates[name])}, expected {_sizes(weights, name)}",
            where=f"{KEY} = {place}",
            hint="give an adapter of this kind of model",
        )
    with torch.no_grad():
        for name, update in updates.items():
            a, b = (weights[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
            a.data[: update.rank] = update.down.reshape(update.rank, *update.kernel).to(a)
            b.data.flatten(1)[:, : update.rank] = (update.up / adapters.scale).to(b)
        if adapters.is_dora:
            adapters.decompose()
        weights = adapters.parameters()
        for name, update in updates.items():
            if update.magnitude is not None:
                magnitude = weights[f"{name}.{MAGNITUDE}"]
                magnitude.data.copy_(update.magnitude.reshape(magnitude.shape))
    return len(adapters.layers) - len(updates)


def _shape(update: Update) -> tuple[int, ...]:
    """Of the layer's weight."""
    return (len(update.up), *update.kernel)


def _sizes(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return (len(weights[f"{name}.lora_B.weight"]), *weights[f"{name}.lora_A.weight"].shape[1:])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
