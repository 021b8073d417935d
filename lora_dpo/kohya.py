"""The adapter in kohya's layout, which ComfyUI, A1111 and Forge load, and the proof that it is the same adapter.

Their SDXL is built from the original network's blocks (`input_blocks_4_1_…`), their SD 1.x and 2.x from diffusers'
(`down_blocks_1_attentions_0_…`). The scale is not folded in here: `.alpha` stands beside the plain weights, and
loaders multiply by alpha / rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_dpo.errors import LoraDpoError
from lora_dpo.export import LOADED_NAME, Probe, Verification, errors_only, predict, tolerance_for, write
from lora_dpo.families import Family

NAME = "kohya"
_PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}
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
_MODELS = {
    "xl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "v2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "v1": ("sd_v1", "stable-diffusion-v1/lora"),
}


class NotInKohyasLayout(LoraDpoError):
    """The adapter has a layer that the layout has no name for, or its file is read as another adapter."""


def save(
    state: Mapping[str, Tensor], alpha: float, family: Family, path: Path | str, metadata: Mapping[str, str]
) -> Path:
    """Write one file in kohya's layout.

    Args:
        state: `<module>.lora_A.weight` and `.lora_B.weight`, the factors as they were trained.
        alpha: loaders multiply by alpha / rank; the rank is the factors'.
        metadata: strings for the file's header, beside those that the programs read (`ss_…`, `modelspec.…`).

    Raises:
        NotInKohyasLayout: a layer without a name there.
        UserError: disk full or directory not writable.
    """
    path = Path(path)
    config = cast(Mapping[str, Any], family.denoiser.config)
    xl = family.name == "sdxl"
    kind = "xl" if xl else "v2" if config["cross_attention_dim"] == 1024 else "v1"
    named: dict[str, Tensor] = {}
    for name, weight in state.items():
        module, part, _ = name.rsplit(".", 2)
        plain = sgm_name(module, config["layers_per_block"]) if xl else module.replace(".", "_")
        named[f"lora_unet_{plain}.{_PARTS[part]}.weight"] = weight
        named[f"lora_unet_{plain}.alpha"] = torch.tensor(float(alpha))
    version, architecture = _MODELS[kind]
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(len(weight) for name, weight in state.items() if ".lora_A." in name)),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": version,
        "ss_v2": str(kind == "v2"),
        "ss_output_name": path.stem,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.title": path.stem,
        **metadata,
    }
    return write(named, path, header)


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


@torch.no_grad()
def verify(family: Family, path: Path | str, probe: Probe) -> Verification:
    """Load the file through diffusers' reader of kohya's layout, and compare with the adapter that is loaded now.

    Call it after `export.verify`, which leaves the file in diffusers' layout loaded: that one is on afterwards too.

    Raises:
        NotInKohyasLayout: diffusers can't read the file, or predictions differ by more than the tolerance.
    """
    path, pipeline = Path(path), family.pipeline()
    wanted = predict(family, probe)
    try:
        with errors_only(), warnings.catch_warnings():
            # peft says that there are two adapters now; that is the point.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=NAME, local_files_only=True)
        pipeline.set_adapters([NAME])
        found = predict(family, probe)
        pipeline.disable_lora()
        base = predict(family, probe)
        pipeline.enable_lora()
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise NotInKohyasLayout(f"{path}: diffusers can't read its kohya layout ({error})") from error
    finally:
        pipeline.set_adapters([LOADED_NAME])
        if NAME in pipeline.get_list_adapters().get("unet", []):
            pipeline.delete_adapters(NAME)
    tolerance = tolerance_for(family, wanted)
    difference, effect = ((wanted - other).abs().max().item() for other in (found, base))
    if not difference <= tolerance:
        raise NotInKohyasLayout(
            f"{path}: in kohya's layout, predictions differ from the trained adapter's by {difference:.3g} "
            f"(tolerance {tolerance:.3g}; the adapter itself changes them by {effect:.3g})"
        )
    return Verification(difference, effect, tolerance)


def keep_if_same(family: Family, path: Path, probe: Probe, tell: Callable[[str], None]) -> Path | None:
    """The file, verified and said to be; None, with the reason said and the file removed, if it isn't the same."""
    try:
        found = verify(family, path, probe)
    except NotInKohyasLayout as error:
        path.unlink()
        tell(f"no file in kohya's layout for this network: {error}")
        return None
    tell(f"{path} is verified: read as kohya's layout, diffusers predicts the same to {found.difference:.1e}")
    return path
