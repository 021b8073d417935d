"""A diffusers pipeline folder, local or from the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer, PreTrainedModel

from lora_dpo.errors import UserError
from lora_dpo.families.files import (
    HUB_ID,
    ModelFiles,
    add_folder,
    config_file,
    errors_only,
    load_model,
    load_tokenizer,
    read_json,
    unreachable,
)
from lora_dpo.families.vae import VaeFolder, other_vae


@final
class PipelineFolder(ModelFiles):
    """Everything as `save_pretrained` wrote it.

    Args:
        base: a folder made by `save_pretrained`, or a hub id ("owner/name") that is in the cache or can be fetched.
        revision: of the hub id.
        vae: another VAE in place of the folder's own: a folder, a hub id, or a .safetensors file with one's weights.
        prediction_type: "epsilon" or "v_prediction", in place of what the folder's scheduler says.

    Raises:
        UserError: neither a folder nor reachable on the hub, or not a pipeline's folder.
    """

    def __init__(
        self,
        base: Path | str,
        *,
        revision: str | None = None,
        vae: Path | str | None = None,
        prediction_type: str | None = None,
    ) -> None:
        self._prediction = {} if prediction_type is None else {"prediction_type": prediction_type}
        self.path = _local_or_hub(base, revision, "model_index.json")
        self.index = read_json(self.path / "model_index.json")
        own = VaeFolder(self.path / "vae")
        self._vae = own if vae is None else other_vae(vae, own.config)

    def has(self, component: str) -> bool:
        return (self.path / component).is_dir()

    def config(self, component: str) -> dict[str, Any]:
        if component == "vae":
            return self._vae.config()
        config = read_json(self._folder(component) / config_file(component))
        return config | self._prediction if component == "scheduler" else config

    def vae(self, device: torch.device) -> AutoencoderKL:
        return self._vae.load(device)

    def unet(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
        return load_model(self._folder("unet"), UNet2DConditionModel, dtype, device)

    def text_encoder(
        self, kind: type[PreTrainedModel], component: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        return load_model(self._folder(component), kind, dtype, device)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        return load_tokenizer(self._folder(component))

    def digest(self, *components: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for component in components:
            if component == "vae":
                self._vae.add(digest)
            else:
                add_folder(digest, component, self._folder(component))
        return digest.hexdigest()

    def _folder(self, component: str) -> Path:
        folder = self.path / component
        if not folder.is_dir():
            raise UserError(f"the base model has no {component}", folder, "use a complete diffusers folder")
        return folder


def _local_or_hub(base: Path | str, revision: str | None, expected: str) -> Path:
    if Path(base).is_dir():
        if not (Path(base) / expected).is_file():
            raise UserError(f"not a diffusers pipeline: it has no {expected}", base, "give the folder above unet/")
        return Path(base)
    if not HUB_ID.fullmatch(str(base)):
        raise UserError("no such folder, and not a hub id (owner/name)", base, "give a diffusers folder or a hub id")
    try:
        # Its own rules choose the files: safetensors only, one variant, no ONNX; the unused networks stay there.
        with errors_only():  # without a network it is said when nothing is in the cache either
            return Path(
                DiffusionPipeline.download(
                    str(base), revision=revision, use_safetensors=True, safety_checker=None, image_encoder=None
                )
            )
    except Exception as error:  # The hub client's errors come from an HTTP library that changes with its version.
        raise unreachable(base, revision, error) from error
