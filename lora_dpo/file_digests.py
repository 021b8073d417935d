"""Digests of files, remembered for as long as the files stay as they are.

Data sets and base models are known by their bytes, and reading those takes minutes at their sizes. So a digest is kept
with what the file system says of the file: its number there, its size, and when its content and its entry changed, to
the nanosecond. The last can't be set by hand, as the first can (`touch -r`, `rsync -t`, unpacking). A file whose entry
changed a moment ago is read each time, since a second change might fall into the same tick of the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from itertools import islice
from pathlib import Path

FILE = "file-digests.sqlite"
READERS = min(8, os.cpu_count() or 1)
TICK_SECONDS = 10.0
COMMIT_SECONDS = 0.2
_AT_ONCE = 256
_READING = ContextVar("reading", default=True)


class NotRemembered(Exception):
    """A digest that only reading the file would give."""


@contextlib.contextmanager
def only_remembered() -> Iterator[None]:
    """Scope in which no file is read for its digest: `NotRemembered` where it would have to be."""
    before = _READING.set(False)
    try:
        yield
    finally:
        _READING.reset(before)


def default_cache_dir() -> Path:
    """Where this machine keeps what can be computed again: `$LORA_DPO_CACHE`, or `lora-dpo` in the user's cache."""
    if chosen := os.environ.get("LORA_DPO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-dpo"


def file_digest(path: Path) -> bytes:
    """BLAKE2b of the file's bytes, 16 bytes."""
    return remembered(path, "bytes", lambda: _read(path))


def file_digests(paths: Sequence[Path]) -> Iterator[bytes]:
    """The same of many, several of which are read at once."""
    remaining, pool = iter(paths), ThreadPoolExecutor(READERS, "digest")
    with _Memory() as memory:
        try:
            while part := list(islice(remaining, _AT_ONCE)):
                keys = [_key(path, "bytes") for path in part]
                known = [memory.get(key) for key in keys]
                if not _READING.get() and None in known:
                    raise NotRemembered
                made = [None if found else pool.submit(_read, path) for path, found in zip(part, known, strict=True)]
                for path, key, found, future in zip(part, keys, known, made, strict=True):
                    digest = found or (_read(path) if future is None else future.result())
                    if found is None:
                        memory.put(path, "bytes", key, digest)
                    yield digest
        finally:
            pool.shutdown(cancel_futures=True)


def remembered(path: Path, what: str, compute: Callable[[], bytes]) -> bytes:
    """`compute()`, 16 bytes that follow from the file's content and from `what`; or what it gave before."""
    key = _key(path, what)
    with _Memory() as memory:
        found = memory.get(key)
        if found is None:
            if not _READING.get():
                raise NotRemembered
            found = compute()
            memory.put(path, what, key, found)
    return found


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _key(path: Path, what: str) -> bytes | None:
    """None for a file whose next change might not be seen."""
    try:
        real = path.resolve()
        seen = real.stat()
    except OSError:
        return None
    if time.time() - seen.st_ctime < TICK_SECONDS:
        return None
    parts = (str(real), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, what)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _Memory:
    """A small database; without one that works, everything is read."""

    def __init__(self) -> None:
        self._base: sqlite3.Connection | None = None
        self._written = 0.0

    def __enter__(self) -> _Memory:
        path = default_cache_dir() / FILE
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                self._base = sqlite3.connect(path, timeout=5)
                self._base.execute("create table if not exists digests (key blob primary key, digest blob)")
                break
            except sqlite3.OperationalError:  # it can't be written, or another process is long at it
                self.__exit__()
                break
            except sqlite3.DatabaseError:  # it is no database any more
                self.__exit__()
                with contextlib.suppress(OSError):
                    path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        base, self._base = self._base, None
        if base is not None:
            with contextlib.suppress(sqlite3.Error):
                base.commit()
            base.close()

    def get(self, key: bytes | None) -> bytes | None:
        if self._base is None or key is None:
            return None
        with contextlib.suppress(sqlite3.Error):
            row = self._base.execute("select digest from digests where key = ?", (key,)).fetchone()
            if row is not None and len(row[0]) == 20 and row[0][16:] == _check(key, row[0][:16]):
                return row[0][:16]
        return None

    def put(self, path: Path, what: str, key: bytes | None, digest: bytes) -> None:
        """Unless the file has changed since its key was made."""
        if self._base is None or key is None or _key(path, what) != key:
            return
        with contextlib.suppress(sqlite3.Error):
            row = (key, digest + _check(key, digest))
            self._base.execute("insert or replace into digests values (?, ?)", row)
            if time.monotonic() - self._written > COMMIT_SECONDS:
                self._base.commit()
                self._written = time.monotonic()


def _check(key: bytes, digest: bytes) -> bytes:
    return zlib.crc32(key + digest).to_bytes(4, "little")
