"""The adapter in kohya's layout, which ComfyUI, A1111 and Forge load, and the proof that it is the same adapter.

The scale is not folded in here: `.alpha` stands beside the plain weights, and loaders multiply by alpha / rank. The
names are those of `kohya_layout`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lora_dpo.adapted_layers import MAGNITUDE
from lora_dpo.export import LOADED_NAME, Probe, Verification, errors_only, predict, tolerance_for, write
from lora_dpo.families import Family
from lora_dpo.kohya_layout import PARTS, PREFIX, NotInKohyasLayout, sgm_name

NAME = "kohya"
_MODELS = {
    "xl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "v2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "v1": ("sd_v1", "stable-diffusion-v1/lora"),
}


def save(
    state: Mapping[str, Tensor], alpha: float, family: Family, path: Path | str, metadata: Mapping[str, str]
) -> Path:
    """Write one file in kohya's layout.

    Args:
        state: `<module>.lora_A.weight` and `.lora_B.weight`, the factors as they were trained.
        alpha: loaders multiply by alpha / rank; the rank is the factors'.
        metadata: strings for the file's header, beside those that the programs read (`ss_…`, `modelspec.…`).

    Raises:
        NotInKohyasLayout: a layer without a name there, or DoRA, of which the programs make different things.
        UserError: disk full or directory not writable.
    """
    path = Path(path)
    config = cast(Mapping[str, Any], family.denoiser.config)
    xl = family.name == "sdxl"
    kind = "xl" if xl else "v2" if config["cross_attention_dim"] == 1024 else "v1"
    if any(name.endswith(MAGNITUDE) for name in state):
        raise NotInKohyasLayout("programs that read it disagree about DoRA's magnitudes (see docs/export.md)")
    named: dict[str, Tensor] = {}
    for name, weight in state.items():
        module, part, _ = name.rsplit(".", 2)
        plain = sgm_name(module, config["layers_per_block"]) if xl else module.replace(".", "_")
        named[f"{PREFIX}{plain}.{PARTS[part]}.weight"] = weight
        named[f"{PREFIX}{plain}.alpha"] = torch.tensor(float(alpha))
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
