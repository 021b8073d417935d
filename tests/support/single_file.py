"""A diffusers folder written as one checkpoint under the original names: LDM's (SD 1.x, 2.x) and SGM's (SDXL).

Written from the original repositories' module trees, not from the reader that is tested with it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def save_single_file(
    folder: Path, file: Path, *, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None
) -> Path:
    """The layout follows from the folder: a second text encoder is SDXL's, a gelu text encoder SD 2.x's."""
    parts = {name: _weights(folder / name) for name in ("unet", "vae", "text_encoder")}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_names(parts["unet"]).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae_names(parts["vae"]).items()}
    first = {f"text_model.{name}": tensor for name, tensor in _bare(parts["text_encoder"]).items()}
    if (folder / "text_encoder_2").is_dir():
        second = open_clip_names(_weights(folder / "text_encoder_2"))
        tensors |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    elif '"gelu"' in (folder / "text_encoder/config.json").read_text():
        named = open_clip_names(parts["text_encoder"])
        # The original has one layer more, whose output the model doesn't use, and a projection that it doesn't use.
        last = max(int(number) for number in re.findall(r"resblocks\.(\d+)\.", " ".join(named)))
        for name in [name for name in named if f"resblocks.{last}." in name]:
            named[name.replace(f".{last}.", f".{last + 1}.", 1)] = torch.rand_like(named[name])
        named["text_projection"] = torch.eye(named["ln_final.weight"].shape[0])
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in named.items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in first.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def unet_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = 1 + max(int(j) for j in re.findall(r"down_blocks\.\d+\.resnets\.(\d+)\.", " ".join(weights)))
    renamed = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in UNET_ENDS:
            new = UNET_ENDS[module]
        elif match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", module):
            side, block, what, layer, rest = match.groups()
            per_block = layers + 1
            place = int(block) * per_block + int(layer)
            stem = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
            new = f"{stem}.0.{RESNET[rest]}" if what == "resnets" else f"{stem}.1.{rest}"
        elif match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
            new = f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op"
        elif match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", module):
            attended = any(key.startswith(f"up_blocks.{match[1]}.attentions.") for key in weights)
            new = f"output_blocks.{(int(match[1]) + 1) * (layers + 1) - 1}.{1 + attended}.conv"
        elif match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.*)", module):
            new = f"middle_block.{2 * int(match[1])}.{RESNET[match[2]]}"
        elif match := re.fullmatch(r"mid_block\.attentions\.0\.(.*)", module):
            new = f"middle_block.1.{match[1]}"
        else:
            raise AssertionError(name)
        renamed[f"{new}.{kind}"] = tensor
    return renamed


def vae_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max(int(level) for level in re.findall(r"encoder\.down_blocks\.(\d+)\.", " ".join(weights)))
    renamed = {}
    for name, tensor in weights.items():
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
        new = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", new)
        for theirs, ours in (("resnets.", "block."), ("upsamplers.0.", "upsample.")):
            new = re.sub(
                rf"decoder\.up_blocks\.(\d+)\.{re.escape(theirs)}",
                lambda match, ours=ours: f"decoder.up.{levels - 1 - int(match[1])}.{ours}",
                new,
            )
        new = re.sub(r"mid_block\.resnets\.(\d)\.", lambda match: f"mid.block_{int(match[1]) + 1}.", new)
        if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", new):
            new = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
            # The originals have 1×1 convolutions where diffusers has linear layers.
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        renamed[new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")] = tensor
    return renamed


def open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    bare = _bare(weights)
    renamed = {
        "token_embedding.weight": bare["embeddings.token_embedding.weight"],
        "positional_embedding": bare["embeddings.position_embedding.weight"],
        "ln_final.weight": bare["final_layer_norm.weight"],
        "ln_final.bias": bare["final_layer_norm.bias"],
    }
    if "text_projection.weight" in bare:
        renamed["text_projection"] = bare["text_projection.weight"].T
    for name, tensor in bare.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name):
            layer, module, kind = match.groups()
            stem = f"transformer.resblocks.{layer}"
            if module in OPEN_CLIP:
                renamed[f"{stem}.{OPEN_CLIP[module]}.{kind}"] = tensor
            elif module == "self_attn.out_proj":
                renamed[f"{stem}.attn.out_proj.{kind}"] = tensor
            elif module == "self_attn.q_proj":
                others = [bare[name.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
                renamed[f"{stem}.attn.in_proj_{kind}"] = torch.cat([tensor, *others])
    return renamed


def _bare(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def _weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
