"""Rows of tensors by key, in safetensors shards that are complete or absent, read through memory maps."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import LoraDpoError, UserError

OPEN_SHARDS = 64


class Store:
    """Append-only. `add` collects rows and writes a shard when it is full; `flush` writes what is left.

    Args:
        directory: created with the first shard.
        bytes_per_shard: a shard is written once it has at least so much.
    """

    def __init__(self, directory: Path, bytes_per_shard: int) -> None:
        self.directory = directory
        self._bytes_per_shard = bytes_per_shard
        self._places: dict[str, tuple[int, int]] = {}
        self._shards: list[Path] = []
        self._waiting: list[dict[str, Tensor]] = []
        self._waiting_keys: dict[str, None] = {}
        self._open: OrderedDict[int, tuple[ExitStack, Any]] = OrderedDict()
        for path in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as shard:
                    keys = shard.metadata()["keys"].split()
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                # Only a failing disk leaves such a file: its rows count as missing, and are made again.
                continue
            self._take_in(path, keys)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting_keys

    def add(self, keys: list[str], tensors: dict[str, Tensor]) -> None:
        """Batch-first tensors, one row per new key; every call with the same names and row shapes."""
        self._waiting.append({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._waiting_keys.update(dict.fromkeys(keys))
        if sum(tensor.nbytes for part in self._waiting for tensor in part.values()) >= self._bytes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Writes the collected rows as a shard."""
        if not self._waiting:
            return
        keys = list(self._waiting_keys)
        tensors = {name: torch.cat([part[name] for part in self._waiting]).contiguous() for name in self._waiting[0]}
        # Named by its keys, so that two processes that fill the same cache write the same files.
        path = self.directory / f"{hashlib.blake2b(' '.join(keys).encode(), digest_size=16).hexdigest()}.safetensors"
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"keys": " ".join(keys)}))
        self._waiting.clear()
        self._waiting_keys.clear()
        self._take_in(path, keys)

    def read(self, key: str) -> dict[str, Tensor]:
        """The key's row, each tensor with a batch dimension of one; KeyError for a key that was never flushed."""
        shard, row = self._places[key]
        handle = self._handle(shard)
        names = handle.keys()
        try:
            return {name: handle.get_slice(name)[row : row + 1] for name in names}
        except (SafetensorError, OSError) as error:
            raise LoraDpoError(f"{self._shards[shard]}: the cache is damaged ({error}); delete this file") from error

    def _take_in(self, path: Path, keys: list[str]) -> None:
        self._shards.append(path)
        self._places.update((key, (len(self._shards) - 1, row)) for row, key in enumerate(keys))

    def _handle(self, shard: int) -> Any:
        """An open shard; only so many are open at once, for the sake of the limit on file descriptors."""
        if shard not in self._open:
            stack = ExitStack()
            try:
                handle = stack.enter_context(safe_open(self._shards[shard], "pt"))
            except (SafetensorError, OSError) as error:
                raise LoraDpoError(f"{self._shards[shard]}: the cache is damaged ({error})") from error
            self._open[shard] = (stack, handle)
            if len(self._open) > OPEN_SHARDS:
                _, (oldest, _) = self._open.popitem(last=False)
                oldest.close()
        self._open.move_to_end(shard)
        return self._open[shard][1]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` gets a temporary name beside `path`; on return the file is complete under its own name, or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            atomic.sync(file)
        temporary.replace(path)
        atomic.sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"can't be written ({error})", path.parent, "free some space or choose another folder"
        ) from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
