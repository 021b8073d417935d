"""Who uses which part of a cache: what stays when it is pruned.

Beside the index of some pairs lies a small file `pairs-….lock`. Whoever fills or reads these pairs holds a shared lock
of the operating system on it, which ends with the process at the latest. Its content names the groups of shards that
the fill writes to and, for people, the data; its time is that of the last use. Without an index it tells that the fill
isn't finished. Taking such a lock waits for a pruning, so that nothing is deleted that was found a moment ago.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_dpo.atomic import clear_os_errors
from lora_dpo.cache_store import HINT
from lora_dpo.errors import UserError
from lora_dpo.run_lock import Answer, try_lock

PRUNING = "prune.lock"
PATIENCE_SECONDS = 600.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Note:
    """The content of a lock file.

    Attributes:
        groups: folders below the cache's directory that the fill writes to.
        about: the data, for people.
    """

    groups: list[str]
    about: str


class Hold:
    """A shared lock, until `close`, or until nothing refers to it, or until the process ends."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._end = weakref.finalize(self, _let_go, descriptor, path)

    def close(self) -> None:
        self._end()


def lock_of(index: Path) -> Path:
    return index.with_suffix(".lock")


def hold(index: Path, groups: Sequence[str], about: str, tell: Callable[[str], None]) -> Hold | None:
    """Takes part in the use of an index, which need not exist yet; None in a directory that can't be written.

    Raises:
        UserError: the directory can't be made.
    """
    with clear_os_errors(index.parent, HINT):
        index.parent.mkdir(parents=True, exist_ok=True)
    with _no_pruning(index.parent, tell):
        descriptor = _opened(lock_of(index), create=True)
        if descriptor is None:
            return None
        held = Hold(descriptor, lock_of(index))
        _acquire(descriptor, shared=True, patience=1.0)  # `in_use` has it for a moment
        # Several holders write the same, as the groups follow from the index's name.
        data = json.dumps(asdict(Note(list(groups), about))).encode()
        with contextlib.suppress(OSError):
            if lock_of(index).read_bytes() != data:
                os.ftruncate(descriptor, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, data)
            os.utime(lock_of(index))
    return held


def note(index: Path) -> Note | None:
    """None where there is none, or where it can't be read."""
    try:
        return Note(**json.loads(lock_of(index).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def in_use(index: Path) -> bool:
    """Whether a process holds it now, or might."""
    if not lock_of(index).exists():
        return False
    descriptor = _opened(lock_of(index))
    if descriptor is None:
        return True
    try:
        return try_lock(descriptor) is not Answer.OURS
    except OSError:
        return True
    finally:
        os.close(descriptor)


def last_use(index: Path) -> float | None:
    """Seconds since the epoch; of the index itself where no lock file tells."""
    for path in (lock_of(index), index):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return None


@contextlib.contextmanager
def pruning(directory: Path) -> Iterator[None]:
    """Scope in which no process begins to use the directory's pairs; those that use some go on.

    Raises:
        UserError: another process prunes, the directory can't be written, or its file system has no locks.
    """
    path = directory / PRUNING
    with clear_os_errors(directory, HINT):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        answer = _acquire(descriptor, patience=10.0)
        if answer is Answer.ANOTHERS:
            raise UserError("another process prunes this cache", where=directory, hint="try again when it is done")
        if answer is Answer.UNSUPPORTED:
            raise UserError(
                "this file system has no locks, so that nobody can tell what is in use",
                where=directory,
                hint="stop the runs that use the cache, and delete folders in it by hand",
            )
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _no_pruning(directory: Path, tell: Callable[[str], None]) -> Iterator[None]:
    descriptor = _opened(directory / PRUNING, create=True)
    if descriptor is None:
        yield
        return
    try:
        if _acquire(descriptor, shared=True) is Answer.ANOTHERS:
            tell("another process prunes this cache: waiting until it is done")
            _acquire(descriptor, shared=True, patience=PATIENCE_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path, *, create: bool = False) -> int | None:
    """For reading and writing, else for reading; None where neither is allowed."""
    for flags in (os.O_RDWR | (os.O_CREAT if create else 0), os.O_RDONLY):
        with contextlib.suppress(OSError):
            return os.open(path, flags, 0o666)
    return None


def _acquire(descriptor: int, *, shared: bool = False, patience: float = 0.0) -> Answer:
    until = time.monotonic() + patience
    while (answer := try_lock(descriptor, shared=shared)) is Answer.ANOTHERS and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return answer


def _let_go(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
    os.close(descriptor)
