"""The names that kohya's layout gives to a UNet's layers, and adapters read from it.

Its SDXL is built from the original network's blocks (`input_blocks_4_1_…`), its SD 1.x and 2.x from diffusers'
(`down_blocks_1_attentions_0_…`). `.alpha` stands beside the factors: the update is alpha / rank times their product.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.updates import Update, Updates

PREFIX = "lora_unet_"
PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


class NotInKohyasLayout(LoraDpoError):
    """The adapter has a layer that the layout has no name for, or its file is read as another adapter."""


def sgm_name(module: str, layers_per_block: int) -> str:
    """The original network's name of a diffusers UNet's layer, with underscores, as kohya's SDXL files have it.

    Args:
        layers_per_block: of the UNet's configuration; a block of the original network is one of these layers.

    Raises:
        NotInKohyasLayout: a layer that it has no name for.
    """
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    if (match := _BLOCK.fullmatch(module)) is None:
        raise NotInKohyasLayout(f"kohya's layout has no name for {module}")
    side, number, middle, kind, place, rest = match.groups()
    layer, per_block = int(place), layers_per_block + 1
    if middle:
        block = f"middle_block_{2 * layer if kind == 'resnets' else 1}"
    elif side == "down":
        inner = 1 if kind == "attentions" else 0
        index = int(number) * per_block + (per_block if kind == "downsamplers" else 1 + layer)
        block = f"input_blocks_{index}_{inner}"
    else:
        # An upsampler follows its block's last ResNet and attention.
        inner = {"resnets": 0, "attentions": 1, "upsamplers": 2}[kind]
        block = (
            f"output_blocks_{int(number) * per_block + (layers_per_block if kind == 'upsamplers' else layer)}_{inner}"
        )
    if kind == "resnets":
        rest = _RESNET[rest]
    elif kind == "downsamplers":
        rest = "op"
    return f"{block}_{rest.replace('.', '_')}"


def is_kohyas(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("lora_unet_", "lora_te")) for key in state)


def read(state: Mapping[str, Tensor]) -> Updates:
    """The updates of a file, by its own names, in float64; without `.alpha` a layer's strength is 1.

    Raises:
        UserError: adapters of the text encoders, DoRA, or anything else than pairs of factors.
    """
    layers = {key.partition(".")[0] for key in state}
    parts = {key.partition(".")[2] for key in state}
    if others := sorted(layer for layer in layers if not layer.startswith(PREFIX)):
        raise UserError(
            f"it holds more than a UNet's LoRA ({others[0]}, …)", hint="adapters of the text encoders aren't used here"
        )
    if strange := sorted(parts - {"alpha", "lora_down.weight", "lora_up.weight"}):
        raise UserError(f"these aren't plain LoRA factors ({strange[0]})", hint="give a LoRA, without DoRA or LyCORIS")
    updates = {}
    for layer in sorted(layers):
        if missing := [f"{layer}.{part}.weight" for part in PARTS.values() if f"{layer}.{part}.weight" not in state]:
            raise UserError(f"there is no {missing[0]}")
        down, up = (state[f"{layer}.{part}.weight"].double() for part in PARTS.values())
        scale = state[f"{layer}.alpha"].item() / len(down) if f"{layer}.alpha" in state else 1.0
        updates[layer] = Update(down.flatten(1), up.flatten(1) * scale, tuple(down.shape[1:]))
    return updates


def renamed(updates: Updates, denoiser: nn.Module, layers_per_block: int) -> Updates:
    """The updates by the denoiser's own names.

    Both kinds of names are understood, whatever the model: some programs write SDXL's with diffusers' blocks.

    Raises:
        UserError: a name that no layer has.
    """
    known: dict[str, str] = {}
    kinds = {name: m for name, m in denoiser.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for module in kinds:
        known[PREFIX + module.replace(".", "_")] = module
        try:
            known[PREFIX + sgm_name(module, layers_per_block)] = module
        except NotInKohyasLayout:
            continue
    if strange := [layer for layer in updates if layer not in known]:
        raise UserError(
            f"{len(strange)} of its {len(updates)} layers are not in this base model ({', '.join(strange[:3])})",
            hint="give an adapter of this kind of model",
        )
    found = {}
    for layer, update in updates.items():
        # Some programs write the factors of linear layers as those of 1 × 1 convolutions.
        flat = isinstance(kinds[known[layer]], nn.Linear) and update.kernel[1:] == (1, 1)
        found[known[layer]] = replace(update, kernel=update.kernel[:1]) if flat else update
    return dict(sorted(found.items()))
