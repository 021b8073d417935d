"""The reference's errors, two numbers per pair and draw, on disk: computed once and read by every later epoch and run.

```text
directory/references-<identity>/about.json         all that the errors depend on
directory/references-<identity>/visit-00003.bin    records of every pair at its 4th draw, in the pairs' order
```
Space for a visit's records is reserved as a file of zeros, without using the disk; a record holds a digest of its pair,
visit and values, so that one that was never written, or half, or has changed since, is unknown and is computed again.
Nothing else needs to be kept in step: processes fill the same files at once, and one may be killed at any moment. No
more is in memory than the records asked for. The files are not mapped: with a map, a full disk would end the process by
a signal, and not by an error that says so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.cache_store import ABOUT, HINT, digest

VERSION = 1
_VALUES, _CHECK = struct.Struct("<ff"), 8
_RECORD = _VALUES.size + _CHECK
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class ReferenceErrors:
    """Errors of winners and losers under one reference, by pair and visit.

    Args:
        directory: of the cache.
        identity: JSON values of all that an error depends on, beside its pair and visit.
        keys: the pairs' content keys.

    Attributes:
        path: the folder of these errors.
        can_write: False in a folder that can't be written, which serves what it has.

    Raises:
        UserError: the disk is full (on `write` too).
    """

    def __init__(self, directory: Path | str, identity: Mapping[str, Any], keys: Sequence[str]) -> None:
        text = json.dumps(identity, sort_keys=True, indent=1)
        self.path = Path(directory) / f"references-{digest(VERSION, text)}"
        self._keys = keys
        self.can_write = True
        with atomic.clear_os_errors(self.path, HINT):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self.path / ABOUT).exists():
                    atomic.replace(self.path / ABOUT, text.encode(), shared=True)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise
                self.can_write = False

    def read(self, places: Sequence[tuple[int, int]]) -> Float[Tensor, "pair 2"]:
        """Winner's and loser's error at each (index, visit), on the CPU; NaN where it isn't known."""
        found = torch.full((len(places), 2), math.nan)
        with atomic.clear_os_errors(self.path, HINT):
            for visit, wanted in _by_visit(places).items():
                with self._opened(visit) as file:
                    if file is not None:
                        for place, index in wanted:
                            found[place] = torch.tensor(self._record(file, index, visit))
        return found

    def write(self, places: Sequence[tuple[int, int]], errors: Float[Tensor, "pair 2"]) -> None:
        """Keep errors, with a NaN for one that was not computed; whole records are replaced."""
        if not self.can_write:
            return
        rows = errors.tolist()
        with atomic.clear_os_errors(self.path, HINT):
            for visit, wanted in _by_visit(places).items():
                with self._opened(visit) as file:
                    for place, index in wanted:
                        values = _VALUES.pack(*rows[place])
                        file.seek(index * _RECORD)
                        file.write(values + self._check(index, visit, values))

    def _record(self, file: IO[bytes], index: int, visit: int) -> tuple[float, float]:
        file.seek(index * _RECORD)
        record = file.read(_RECORD)
        values, check = record[: _VALUES.size], record[_VALUES.size :]
        return _VALUES.unpack(values) if check == self._check(index, visit, values) else (math.nan, math.nan)

    def _check(self, index: int, visit: int, values: bytes) -> bytes:
        return hashlib.blake2b(f"{self._keys[index]} {visit} ".encode() + values, digest_size=_CHECK).digest()

    @contextmanager
    def _opened(self, visit: int) -> Iterator[Any]:
        """Unbuffered: a record goes to the system in one piece, and another process's is seen at once."""
        path = self.path / f"visit-{visit:05d}.bin"
        if not self.can_write and not path.exists():
            yield None
            return
        if self.can_write:
            path.open("ab").close()
        with path.open("r+b" if self.can_write else "rb", 0) as file:
            if self.can_write and file.seek(0, os.SEEK_END) < (size := len(self._keys) * _RECORD):
                file.truncate(size)  # longer, by zeros: what another process has written meanwhile stays
            yield file


def _by_visit(places: Sequence[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """visit → (place in the sequence, index)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for place, (index, visit) in enumerate(places):
        found.setdefault(visit, []).append((place, index))
    return found
