"""A base model without its weights: its settings, and networks of fake tensors made from them.

Settings come from the base's own files where these are on this machine. Nothing is fetched: a base of the hub that
isn't here is taken for its family's original, whose settings are in the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from lora_dpo.errors import LoraDpoError
from lora_dpo.fake_device import FakeDevice
from lora_dpo.families import clip
from lora_dpo.families.files import ModelFiles, read_json
from lora_dpo.families.folder import PipelineFolder
from lora_dpo.families.originals import SD1, SD2, SDXL, Original
from lora_dpo.families.single_file import SUFFIX, SingleFile


@runtime_checkable
class Settings(Protocol):
    """What of `ModelFiles` needs no weights."""

    path: Path
    index: dict[str, Any]

    def has(self, component: str) -> bool: ...

    def config(self, component: str) -> dict[str, Any]: ...

    def tokenizer(self, component: str) -> CLIPTokenizer: ...


@final
class Hollow(ModelFiles):
    """Networks on a fake device. The denoiser stays on "meta" until `fake.hold` has it, after all changes to it."""

    def __init__(self, settings: Settings, fake: FakeDevice) -> None:
        self.path, self.index = settings.path, settings.index
        self._settings, self._fake = settings, fake

    def has(self, component: str) -> bool:
        return self._settings.has(component)

    def config(self, component: str) -> dict[str, Any]:
        return self._settings.config(component)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        return self._settings.tokenizer(component)

    def vae(self, device: torch.device) -> AutoencoderKL:
        return self._fake.hold(self._made(AutoencoderKL, "vae", torch.float32))

    def unet(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
        return self._made(UNet2DConditionModel, "unet", dtype)

    def text_encoder(
        self, kind: type[PreTrainedModel], component: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        # A saved configuration names the type of its weights, which would be taken for these.
        config = CLIPTextConfig(**self.config(component) | {"dtype": dtype, "torch_dtype": None})
        with self._fake.building(dtype):
            model = kind(config).requires_grad_(False).eval()
        return self._fake.hold(model)

    def digest(self, *components: str) -> str:
        raise LoraDpoError("a base model without weights has no digest of them")

    def _made(self, kind: Any, component: str, dtype: torch.dtype) -> Any:
        with self._fake.building(dtype):
            return kind.from_config(self.config(component)).requires_grad_(False).eval()


class _OfOriginal:
    def __init__(self, original: Original, name: str, prediction_type: str | None, vae: Path | None) -> None:
        self.path, self.index, self._original = Path(name), original.index, original
        self._prediction, self._vae = prediction_type or original.prediction_type or "epsilon", vae

    def has(self, component: str) -> bool:
        return component in self._original.configs or component in self._original.pad_tokens

    def config(self, component: str) -> dict[str, Any]:
        if component == "vae" and self._vae is not None and self._vae.is_dir():
            return read_json(self._vae / "config.json")
        config = dict(self._original.configs[component])
        return config | {"prediction_type": self._prediction} if component == "scheduler" else config

    def tokenizer(self, component: str) -> CLIPTokenizer:
        return clip.tokenizer(self._original.pad_tokens[component])


def find_settings(
    base: Path | str,
    *,
    family: str,
    revision: str | None = None,
    vae: Path | str | None = None,
    config: Path | str | None = None,
    prediction_type: str | None = None,
) -> tuple[Settings, list[str]]:
    """The settings of a base model, arguments as for `UNetFamily`, and what was taken for granted about it.

    Raises:
        UserError: files that are here and can't be read.
    """
    own_vae, absent = (None, None) if vae is None else _vae(vae)
    notes = [f"{absent} isn't on this machine: taken for a VAE like the original's"] if absent else []
    if str(base).endswith(SUFFIX) and not Path(base).is_dir():
        folder = None if config is None else _here(config, revision)
        if config is not None and folder is None:
            notes.append(f"{config} isn't on this machine: the original's settings are taken")
        return SingleFile(base, config=folder, vae=own_vae, prediction_type=prediction_type), notes
    folder = _here(base, revision)
    if folder is not None and (Path(base).is_dir() or _complete(folder)):
        return PipelineFolder(folder, vae=own_vae, prediction_type=prediction_type), notes
    original = SDXL if family == "sdxl" else _stable_diffusion(str(base))
    notes.insert(0, f"{base} isn't on this machine: taken for {original.title}")
    return _OfOriginal(original, str(base), prediction_type, own_vae), notes


def _here(name: Path | str, revision: str | None) -> Path | None:
    """A folder, or a hub repository's in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None


def _complete(folder: Path) -> bool:
    """Whether the hub's cache has all settings; it may have single files only."""
    configs = [f"{component}/config.json" for component in ("unet", "vae", "text_encoder")]
    return all((folder / name).exists() for name in ("model_index.json", "tokenizer", *configs))


def _vae(vae: Path | str) -> tuple[Path | None, str | None]:
    """Another VAE's folder, or its file, which has weights alone; else what isn't here."""
    if str(vae).endswith(SUFFIX) and not Path(vae).is_dir():
        return Path(vae), None
    root = _here(vae, None)
    for folder in () if root is None else (root, root / "vae"):
        if (folder / "config.json").is_file():
            return folder, None
    return None, str(vae)


def _stable_diffusion(name: str) -> Original:
    """By the names that Stable Diffusion 2.x has on the hub."""
    bare = name.rpartition("/")[2].lower()
    return SD2 if any(mark in bare for mark in ("diffusion-2", "sd2", "sd-2", "v2-")) else SD1
