"""A diffusers pipeline folder, local or from the hub, whose components are loaded one at a time and identified."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lora_dpo.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A transformers model and a diffusers model call their weights differently; "fp16" is diffusers' variant.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>fp16))?(?:-\d+-of-\d+)?\.safetensors")


class PipelineFolder:
    """The files of one base model.

    Args:
        base: a folder made by `save_pretrained`, or a hub id ("owner/name") that is in the cache or can be fetched.
        revision: of the hub id.
        vae: another VAE in place of the folder's own: a folder or a hub id.

    Raises:
        UserError: neither a folder nor reachable on the hub, or not a pipeline's folder.
    """

    def __init__(self, base: Path | str, *, revision: str | None = None, vae: Path | str | None = None) -> None:
        self.path = _local_or_hub(base, revision, "model_index.json")
        self.index = read_json(self.path / "model_index.json")
        self._vae = self.path / "vae" if vae is None else _vae_folder(vae)

    def config(self, component: str) -> dict[str, Any]:
        """The component's own configuration file."""
        name = {"scheduler": "scheduler_config.json"}.get(component, "config.json")
        return read_json(self._folder(component) / name)

    def vae(self, device: torch.device) -> AutoencoderKL:
        """In float32 whatever the files hold: SDXL's VAE overflows in float16."""
        return self._model(AutoencoderKL, "vae", torch.float32, device)

    def unet(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
        return self._model(UNet2DConditionModel, "unet", dtype, device)

    def text_encoder(
        self, kind: type[PreTrainedModel], component: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel:
        return self._model(kind, component, dtype, device)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        folder = self._folder(component)
        with _explained(folder), quiet():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def scheduler(self) -> Any:
        """The sampler that the folder names, with its settings."""
        name = str(self.config("scheduler").get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise UserError(f"unknown scheduler {name!r}", self._folder("scheduler") / "scheduler_config.json")
        with _explained(self._folder("scheduler")):
            return kind.from_pretrained(self._folder("scheduler"))

    def digest(self, *components: str) -> str:
        """Of every byte that decides what the components compute: weights in use, configurations, vocabularies."""
        digest = hashlib.blake2b(digest_size=16)
        for component in components:
            folder = self._folder(component)
            loaded = set(self._weights(component)[0]) if not component.startswith("tokenizer") else set()
            for file in sorted(folder.iterdir()):
                if file in loaded or file.suffix in (".json", ".txt"):
                    digest.update(f"\x1e{component}/{file.name}\x1f".encode())
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).digest())
        return digest.hexdigest()

    def _folder(self, component: str) -> Path:
        folder = self._vae if component == "vae" else self.path / component
        if not folder.is_dir():
            raise UserError(f"the base model has no {component}", folder, "use a complete diffusers folder")
        return folder

    def _weights(self, component: str) -> tuple[list[Path], str | None]:
        """The files that will be loaded, and their variant: the plain ones if they are there, else "fp16"."""
        folder = self._folder(component)
        variants: dict[str | None, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            if match := WEIGHTS.fullmatch(file.name):
                variants.setdefault(match["variant"], []).append(file)
        for variant in (None, "fp16"):
            if variant in variants:
                return variants[variant], variant
        raise UserError("no safetensors weights here", folder, "convert them: pickled weights are not loaded")

    def _model(self, kind: Any, component: str, dtype: torch.dtype, device: torch.device) -> Any:
        folder = self._folder(component)
        _, variant = self._weights(component)
        # Without a dtype, transformers keeps the file's and diffusers takes float32: they then don't fit together.
        name = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
        with _explained(folder), quiet():
            model: Any = kind.from_pretrained(
                folder, variant=variant, use_safetensors=True, local_files_only=True, **{name: dtype}
            )
        return model.to(device).requires_grad_(False).eval()


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("the base model's folder lacks this file", path, "use a complete diffusers folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"can't be read as JSON ({error})", path) from error
    if not isinstance(value, dict):
        raise UserError("this file should hold a JSON object", path)
    return value


def _local_or_hub(base: Path | str, revision: str | None, expected: str) -> Path:
    if Path(base).is_dir():
        if not (Path(base) / expected).is_file():
            raise UserError(f"not a diffusers pipeline: it has no {expected}", base, "give the folder above unet/")
        return Path(base)
    if not HUB_ID.fullmatch(str(base)):
        raise UserError("no such folder, and not a hub id (owner/name)", base, "give a diffusers folder or a hub id")
    try:
        # Its own rules choose the files: safetensors only, one variant, no ONNX; the unused networks stay there.
        return Path(
            DiffusionPipeline.download(
                str(base), revision=revision, use_safetensors=True, safety_checker=None, image_encoder=None
            )
        )
    except Exception as error:  # The hub client's errors come from an HTTP library that changes with its version.
        raise _unreachable(base, revision, error) from error


def _vae_folder(vae: Path | str) -> Path:
    """A VAE's own folder or hub id, or a pipeline's folder with a VAE in it."""
    if not Path(vae).is_dir():
        if not HUB_ID.fullmatch(str(vae)):
            raise UserError("no such VAE folder, and not a hub id (owner/name)", vae, "give a folder or a hub id")
        from huggingface_hub import snapshot_download

        try:
            root = Path(snapshot_download(str(vae), allow_patterns=["config.json", "*.safetensors", "vae/*"]))
        except Exception as error:  # As above.
            raise _unreachable(vae, None, error) from error
    else:
        root = Path(vae)
    for folder in (root, root / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError("no VAE here: there is no config.json", root, "give the folder that save_pretrained made")


def _unreachable(name: object, revision: str | None, error: Exception) -> UserError:
    at = f" at revision {revision!r}" if revision else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"neither a folder here nor to be had from the hub{at} ({reason})",
        name,
        "check the name and the network, or download it first and give the folder",
    )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(f"can't be loaded ({type(error).__name__}: {error})", folder, "download it again") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Scope without either library's loading bars; afterwards each is as it was."""
    libraries = [
        (library, enabled)
        for library, enabled in (
            (transformers_logging, transformers_logging.is_progress_bar_enabled()),
            (diffusers_logging, diffusers_logging.is_progress_bar_enabled()),
        )
        if enabled
    ]
    try:
        for library, _ in libraries:
            library.disable_progress_bar()
        yield
    finally:
        for library, _ in libraries:
            library.enable_progress_bar()
