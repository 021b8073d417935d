"""One safetensors file with a model's tensors under some naming, and a model made of them."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from diffusers.utils import logging
from safetensors import safe_open
from torch import Tensor

from lora_dpo.errors import UserError
from lora_dpo.families.files import explained, frozen, quiet
from lora_dpo.file_digests import remembered


@final
class TensorFile:
    """A file of which nothing but the header is read until tensors are asked for.

    Attributes:
        header: name → dtype, shape, data_offsets.
        metadata: strings from the file's header.

    Raises:
        UserError: no such file, or no safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                if length > path.stat().st_size:
                    raise ValueError("cut short")
                header: dict[str, Any] = json.loads(opened.read(length))
        except FileNotFoundError as error:
            raise UserError("no such checkpoint", path) from error
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"can't be read as safetensors ({error})", path, "download it again") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.header, self._begin = header, 8 + length

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.header if name.startswith(prefix))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with explained(self.path), safe_open(self.path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}

    def digest(self, what: str, names: Iterable[str]) -> bytes:
        """Of these tensors' bytes, 16 bytes.

        Args:
            what: tells them from others of the file, where the digest is remembered.
        """
        return remembered(self.path, what, lambda: self._digest(names))

    def _digest(self, names: Iterable[str]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        with self.path.open("rb") as opened:
            for name in names:
                entry = self.header[name]
                begin, end = entry["data_offsets"]
                digest.update(f"\x1e{name}\x1f{entry['dtype']}{entry['shape']}".encode())
                opened.seek(self._begin + begin)
                while begin < end:
                    part = opened.read(min(end - begin, 1 << 24))
                    if not part:
                        raise UserError("this file is cut short", self.path, "download it again")
                    digest.update(part)
                    begin += len(part)
        return digest.digest()


def diffusers_model(
    kind: Any,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    where: Path,
    dtype: torch.dtype,
    device: torch.device,
    lacking: UserError,
) -> Any:
    """A frozen model of `kind`, from tensors under their original names or under diffusers'.

    Raises:
        UserError: `lacking`, where some of its tensors aren't there; about `where`, if it can't be made otherwise.
    """
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    verbosity = logging.get_verbosity()
    with explained(where), quiet(), tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **settings}))
        try:
            logging.set_verbosity_error()  # it warns of modules to be kept in float32, and names none
            model = kind.from_single_file(dict(weights), config=folder, torch_dtype=dtype, local_files_only=True)
        except NotImplementedError as error:  # torch's, for parameters that have stayed without values
            raise lacking from error
        finally:
            logging.set_verbosity(verbosity)
    return frozen(model, device)
