"""Rows of tensors by key, in safetensors shards that are complete or absent, checked and read through memory maps.

A shard is named by a digest of its keys, which stand in its header, and holds a checksum of each row: a file that was
cut, or in which any bit has changed, is found out when it is opened or when the row is read, and is never used.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import LoraDpoError
from lora_dpo.mapped_tensors import mapped

OPEN_SHARDS = 64
CHECK = "row_check"
ABOUT = "about.json"
SUFFIX = ".safetensors"
HINT = "change its permissions, or choose another folder: output.cache_dir, or $LORA_DPO_CACHE"


class Damaged(LoraDpoError):
    """A shard that can't be used as it is."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: this part of the cache is damaged ({reason}); delete it")


def digest(*parts: object) -> str:
    """Of the parts and their boundaries, 32 hex digits; bytes as they are, everything else as text."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little"))
        made.update(data)
    return made.hexdigest()


def row_check(key: str, row: Mapping[str, Tensor]) -> int:
    """CRC-32 of a row under its key: names, dtypes, shapes and bytes."""
    check = zlib.crc32(key.encode())
    for name in sorted(row):
        tensor = row[name].contiguous()
        check = zlib.crc32(f"{name}{tensor.dtype}{list(tensor.shape)}".encode(), check)
        check = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, check)
    return check


class Shard:
    """One open file.

    Raises:
        Damaged: no such file, or not the one that its name tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors, metadata = mapped(path)
            keys = metadata["keys"].split()
            # Many thousand of small rows fit into a shard, and many shards are open.
            self._keys = np.array(keys, np.bytes_)
            self._checks = self._tensors.pop(CHECK)
            lengths = {len(part) for part in (*self._tensors.values(), self._checks)}
        except FileNotFoundError as error:
            raise Damaged(path, "it is missing") from error
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise Damaged(path, str(error) or type(error).__name__) from error
        if path.name != _name(keys) or lengths != {len(keys)} or self._checks.dtype != torch.int64:
            raise Damaged(path, "its header has changed")

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> list[str]:
        """Of its rows, in order."""
        return [key.decode() for key in self._keys.tolist()]

    def row(self, index: int) -> dict[str, Tensor]:
        """Each tensor with a batch dimension of one; Damaged if it isn't what was written."""
        try:
            row = {name: part[index : index + 1] for name, part in self._tensors.items()}
            sound = row_check(self._keys[index].decode(), row) == self._checks[index].item()
        except (IndexError, RuntimeError) as error:
            raise Damaged(self.path, str(error)) from error
        if not sound:
            raise Damaged(self.path, f"the checksum of row {index} is wrong")
        return row

    def verify(self) -> None:
        """Reads everything; raises Damaged at the first row that isn't what was written."""
        for index in range(len(self)):
            self.row(index)

    def close(self) -> None:
        """Lets go of the file once no row of it is referred to any more."""
        self._tensors.clear()
        del self._checks


def read_about(directory: Path) -> dict[str, Any]:
    """What made the rows of a store; empty where that can't be read."""
    try:
        about = json.loads((directory / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def discard(path: Path) -> bool:
    """Deletes a damaged file; False where that isn't allowed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


class Store:
    """The shards of one directory while they are being made. `add` collects rows, `flush` writes them as a shard.

    Damaged shards are deleted when they are met, so that their rows count as missing.

    Args:
        directory: created with the first shard.
        about: what made the rows, written beside the first shard for `lora-dpo cache --stats`.
        bytes_per_shard: a shard is written once it has at least so much; None: by `flush` alone.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any], bytes_per_shard: int | None = None) -> None:
        self.directory, self._about = directory, dict(about)
        self._bytes_per_shard = bytes_per_shard
        self.damaged: list[Damaged] = []
        self._places: dict[str, tuple[str, int]] = {}
        self._seen: set[str] = set()
        self._waiting: list[dict[str, Tensor]] = []
        self._waiting_keys: dict[str, None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes in the shards that other processes have written since."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            if path.name in self._seen:
                continue
            try:
                shard = Shard(path)
            except Damaged as error:
                self.damaged.append(error)
                discard(path)
                continue
            self._take_in(path, shard.keys)
            shard.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting_keys

    def place(self, key: str) -> tuple[str, int]:
        """File name and row; KeyError for a key that was never flushed."""
        return self._places[key]

    def add(self, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Batch-first tensors, one row per new key; every call with the same names and row shapes."""
        self._waiting.append({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._waiting_keys.update(dict.fromkeys(keys))
        size = sum(tensor.nbytes for part in self._waiting for tensor in part.values())
        if self._bytes_per_shard is not None and size >= self._bytes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Writes the collected rows as a shard; UserError where the disk is full or can't be written."""
        if not self._waiting:
            return
        keys = list(self._waiting_keys)
        tensors = {name: torch.cat([part[name] for part in self._waiting]).contiguous() for name in self._waiting[0]}
        checks = [
            row_check(key, {name: tensor[row : row + 1] for name, tensor in tensors.items()})
            for row, key in enumerate(keys)
        ]
        # Two processes that make the same rows write the same file.
        path = self.directory / _name(keys)
        with atomic.clear_os_errors(self.directory, HINT):
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / ABOUT).exists():
                atomic.replace(self.directory / ABOUT, json.dumps(self._about, indent=1).encode(), shared=True)
            data = save({**tensors, CHECK: torch.tensor(checks)}, {"keys": " ".join(keys)})
            atomic.replace(path, data, shared=True)
        self._waiting.clear()
        self._waiting_keys.clear()
        self._take_in(path, keys)

    def _take_in(self, path: Path, keys: Sequence[str]) -> None:
        self._seen.add(path.name)
        self._places.update((key, (path.name, row)) for row, key in enumerate(keys))


class Reader:
    """Rows by (shard, row); only so many shards are open at once, for the sake of the limit on file descriptors."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """Views of the file, each with a batch dimension of one; Damaged if it isn't what was written."""
        if shard not in self._open:
            self._open[shard] = Shard(self._paths[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard].row(row)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _name(keys: Sequence[str]) -> str:
    return hashlib.blake2b(" ".join(keys).encode(), digest_size=16).hexdigest() + SUFFIX
