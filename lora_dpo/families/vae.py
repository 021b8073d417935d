"""Where a VAE comes from: a folder that says all, or a file that has weights and nothing else."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AutoencoderKL

from lora_dpo.errors import UserError
from lora_dpo.families.files import add_folder, load_model, read_json, vae_folder
from lora_dpo.families.tensor_file import TensorFile, diffusers_model

SUFFIX = ".safetensors"
# What a checkpoint of a whole model calls its VAE.
PREFIXES = ("first_stage_model.", "vae.")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
MARKS = ("encoder.down.0.", "encoder.down_blocks.0.")  # of the originals' names, and of diffusers'
HINT = "it has to be of the same architecture as the base model's own; another one needs its diffusers folder"


class Vae(ABC):
    """A VAE that isn't loaded yet."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """In diffusers' words."""

    @abstractmethod
    def load(self, device: torch.device) -> AutoencoderKL:
        """In float32 whatever the files hold."""

    @abstractmethod
    def add(self, digest: hashlib.blake2b) -> None:
        """All that decides what it computes, to a digest."""


@final
class VaeFolder(Vae):
    """As `save_pretrained` wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    def load(self, device: torch.device) -> AutoencoderKL:
        return load_model(self.folder, AutoencoderKL, torch.float32, device)

    def add(self, digest: hashlib.blake2b) -> None:
        add_folder(digest, "vae", self.folder)


@final
class VaeFile(Vae):
    """One safetensors file: a VAE by itself, under its original names or diffusers', or a whole model with one.

    Args:
        config: of the base model's own VAE, which must be of the same architecture and scale.

    Raises:
        UserError: no such file, or no VAE in it.
    """

    def __init__(self, file: Path, config: Callable[[], dict[str, Any]]) -> None:
        self._file, self._config = TensorFile(file), config
        for prefix in (*PREFIXES, ""):
            names = self._file.names(prefix)
            if any(name.removeprefix(prefix).startswith(MARKS) for name in names):
                self._prefix = prefix
                # Beside them lie the parts of its training, in some files.
                self._names = [name for name in names if name.removeprefix(prefix).startswith(PARTS)]
                return
        raise UserError("there is no VAE in this file", file, "give a VAE's folder, its file, or a whole checkpoint")

    def config(self) -> dict[str, Any]:
        return self._config()

    def load(self, device: torch.device) -> AutoencoderKL:
        path = self._file.path
        weights = {name.removeprefix(self._prefix): tensor for name, tensor in self._file.read(self._names).items()}
        lacking = UserError("this VAE lacks tensors that the base model's own has", path, HINT)
        try:
            model = diffusers_model(AutoencoderKL, weights, self.config(), path, torch.float32, device, lacking)
        except UserError as error:
            raise UserError(error.what, path, HINT) from error
        # The reader takes what it knows and leaves the rest; the formats have the same tensors under other names.
        if len(weights) != len(model.state_dict()):
            raise UserError("this VAE has tensors that the base model's own lacks", path, HINT)
        return model

    def add(self, digest: hashlib.blake2b) -> None:
        digest.update(f"\x1evae\x1f{json.dumps(self.config(), sort_keys=True)}".encode())
        digest.update(self._file.digest("vae beside a base", self._names))


def other_vae(name: Path | str, own_config: Callable[[], dict[str, Any]]) -> Vae:
    """The VAE that a user names: a folder, a hub id, or a .safetensors file.

    Args:
        own_config: of the base model's own VAE.
    """
    if str(name).endswith(SUFFIX) and not Path(name).is_dir():
        return VaeFile(Path(name), own_config)
    return VaeFolder(vae_folder(name))
