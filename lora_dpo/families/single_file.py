"""A checkpoint that is one .safetensors file with the tensors' original names (LDM's and SGM's), read offline.

Such a file has weights and nothing else. The settings come from `originals`, or from a folder that the user names; the
tokenizer is CLIP's own, or that folder's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from lora_dpo.errors import UserError
from lora_dpo.families import clip
from lora_dpo.families.files import (
    HUB_ID,
    ModelFiles,
    add_folder,
    config_file,
    explained,
    from_hub,
    frozen,
    load_tokenizer,
    quiet,
    read_json,
)
from lora_dpo.families.originals import ORIGINALS, OTHERS, UNET, Original
from lora_dpo.families.tensor_file import TensorFile, diffusers_model
from lora_dpo.families.vae import other_vae

SUFFIX = ".safetensors"
TOKENIZERS = ("tokenizer", "tokenizer_2")


@final
class SingleFile(ModelFiles):
    """One file with the denoiser, the text encoders and the VAE.

    Args:
        file: the checkpoint.
        config: a diffusers folder or a hub id whose configurations and tokenizers (not its weights) hold; by default
            those of SD 1.5, SD 2.1 or SDXL, whichever the file is.
        revision: of `config`, if that is a hub id.
        vae: another VAE in place of the file's own: a folder, a hub id, or a .safetensors file with one's weights.
        prediction_type: "epsilon" or "v_prediction", whatever the file and the folder say; an SD 2.x file without
            marks needs it.

    Raises:
        UserError: no such file, or not a checkpoint of these models.
    """

    def __init__(
        self,
        file: Path | str,
        *,
        config: Path | str | None = None,
        revision: str | None = None,
        vae: Path | str | None = None,
        prediction_type: str | None = None,
    ) -> None:
        self.path, self._given = Path(file), prediction_type
        self._file = TensorFile(self.path)
        self._original = _recognised(self._file.header, self.path)
        self._vae = None if vae is None else other_vae(vae, lambda: self._own_config("vae"))
        self._configs = None if config is None else _config_folder(config, revision)
        index = self._configs / "model_index.json" if self._configs is not None else None
        self.index = read_json(index) if index is not None and index.is_file() else dict(self._original.index)

    def has(self, component: str) -> bool:
        if component == "vae" and self._vae is not None:
            return True
        prefix = self._original.prefixes.get(component)
        if prefix is None:
            return component == "scheduler" or component in self._original.pad_tokens
        return bool(self._file.names(prefix))

    def config(self, component: str) -> dict[str, Any]:
        if component == "vae" and self._vae is not None:
            return self._vae.config()
        return self._own_config(component)

    def _own_config(self, component: str) -> dict[str, Any]:
        if self._configs is not None and (self._configs / component).is_dir():
            config = read_json(self._configs / component / config_file(component))
        else:
            config = dict(self._original.configs[component])
            if component == "unet":
                # The two SD 2.1 differ in their size as they do in their prediction.
                large = self._original.prediction_type is None and self._prediction() == "v_prediction"
                config |= {"sample_size": 96} if large else {}
        if component == "scheduler":
            # A marked file is surer than a folder that was made for another of its kind.
            told = self._prediction() or config.get("prediction_type") or self._original.prediction_type
            if told is None:
                raise UserError(
                    f"whether a {self._original.title} checkpoint predicts ε or v can't be told from its file",
                    self.path,
                    'give base.prediction_type: "v_prediction" for SD 2.1 at 768 pixels, "epsilon" for its base at 512',
                )
            config["prediction_type"] = told
            if "ztsnr" in self._file.header:
                config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def vae(self, device: torch.device) -> AutoencoderKL:
        if self._vae is not None:
            return self._vae.load(device)
        return self._diffusers_model(AutoencoderKL, "vae", torch.float32, device)

    def unet(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
        return self._diffusers_model(UNet2DConditionModel, "unet", dtype, device)

    def text_encoder(
        self, kind: type[PreTrainedModel], component: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        prefix = self._original.prefixes[component]
        weights = {name.removeprefix(prefix): tensor for name, tensor in self._read(component).items()}
        if any(name.startswith("transformer.resblocks.") for name in weights):
            weights = clip.from_open_clip(weights)
        config = CLIPTextConfig(**self.config(component))
        with torch.device("meta"):
            expected = kind(config).state_dict()
        # transformers has had these names with this prefix and without, and so have the files.
        bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        found = {name: bare.get(name.removeprefix("text_model.")) for name in expected}
        self._same_shapes(component, expected, found)
        with explained(self.path), quiet():
            model = kind.from_pretrained(None, config=config, state_dict=found, dtype=dtype)
        return frozen(model, device)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        if self._configs is not None and (self._configs / component).is_dir():
            return load_tokenizer(self._configs / component)
        return clip.tokenizer(self._original.pad_tokens[component])

    def digest(self, *components: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for component in components:
            if component == "vae" and self._vae is not None:
                self._vae.add(digest)
            elif component in TOKENIZERS:
                if self._configs is not None and (self._configs / component).is_dir():
                    add_folder(digest, component, self._configs / component)
                else:
                    digest.update(f"\x1e{component}\x1f{self._original.pad_tokens[component]}".encode())
                    digest.update(clip.MERGES.read_bytes())
            else:
                settings = json.dumps(self.config(component), sort_keys=True)
                digest.update(f"\x1e{component}\x1f{settings}".encode())
                digest.update(self._file.digest(component, self._names(component)))
        return digest.hexdigest()

    def _prediction(self) -> str | None:
        """What was given, or what the file says: a tensor named v_pred, or the modelspec's metadata; None: nothing."""
        if self._given is not None:
            return self._given
        if "v_pred" in self._file.header:
            return "v_prediction"
        said = self._file.metadata.get("modelspec.prediction_type", "").lower()
        return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(said)

    def _names(self, component: str) -> list[str]:
        prefix = self._original.prefixes[component]
        names = self._file.names(prefix)
        if not names:
            hint = "name one with base.vae" if component == "vae" else "use a complete checkpoint"
            raise UserError(f"this {self._original.title} checkpoint has no {component}", self.path, hint)
        return names

    def _read(self, component: str) -> dict[str, Tensor]:
        """The component's tensors under their names in the file, and no other component's."""
        return self._file.read(self._names(component))

    def _diffusers_model(self, kind: Any, component: str, dtype: torch.dtype, device: torch.device) -> Any:
        weights, config = self._read(component), self.config(component)
        lacking = UserError(f"this checkpoint lacks tensors of the {component}", self.path, _CONFIG_HINT)
        return diffusers_model(kind, weights, config, self.path, dtype, device, lacking)

    def _same_shapes(self, component: str, expected: dict[str, Tensor], found: dict[str, Tensor | None]) -> None:
        lacking = [name for name, tensor in found.items() if tensor is None]
        if lacking:
            what = f"the {component} lacks {len(lacking)} tensors, the first is {lacking[0]}"
            raise UserError(what, self.path, _CONFIG_HINT)
        for name, tensor in found.items():
            if tensor is not None and tensor.shape != expected[name].shape:
                what = f"{component}: {name} is {list(tensor.shape)}, its settings say {list(expected[name].shape)}"
                raise UserError(what, self.path, _CONFIG_HINT)


_CONFIG_HINT = "if the model is not of its original's size, name a diffusers folder with its settings as base.config"


def _recognised(header: dict[str, Any], file: Path) -> Original:
    for original in ORIGINALS:
        if all(any(name.startswith(mark) for name in header) for mark in original.marks):
            if not any(name.startswith(UNET) for name in header):
                raise UserError(f"this {original.title} checkpoint has no unet", file, "use a complete checkpoint")
            return original
    for part, what in OTHERS:
        if any(part in name for name in header):
            raise UserError(f"not a base model that can be trained here: this is {what}", file)
    raise UserError(
        "not a checkpoint of SD 1.x, SD 2.x or SDXL: no text encoder of theirs is in it",
        file,
        "use a complete checkpoint, or a diffusers folder",
    )


def _config_folder(config: Path | str, revision: str | None) -> Path:
    if Path(config).is_dir():
        return Path(config)
    if not HUB_ID.fullmatch(str(config)):
        raise UserError(
            "no such folder, and not a hub id (owner/name)", config, "give a diffusers folder, or leave base.config out"
        )
    return from_hub(config, revision, ["*.json", "*/*.json", "*/*.txt"])
