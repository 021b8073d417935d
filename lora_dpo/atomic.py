"""Files that are complete or absent, and clear words for a full disk."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_dpo.errors import UserError

PARTIAL = ".partial"
RUN_DIR_HINT = "change its permissions, or choose another directory (--run-dir)"


def replace(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write beside `path` and rename: readers see the old file or the new one, never a part.

    With `shared`, several processes may do this to the same path at once.
    """
    own = f".{os.getpid()}-{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{own}{PARTIAL}")
    try:
        write(partial, data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def clear_os_errors(where: Path, hint: str = RUN_DIR_HINT) -> Iterator[None]:
    """A full disk, or a place that can't be written, becomes a UserError that says so; `hint` is for the latter.

    With a full disk the exit code is 1: the same command may do better later.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            what, todo = "no space left on the disk", "free some space and run again: a run resumes where it was saved"
        else:
            what, todo = f"can't be written ({error.strerror or error})", hint
        refused = UserError(what, where=error.filename or where, hint=todo)
        refused.exit_code = 1 if full else refused.exit_code
        raise refused from error


def write(path: Path, data: bytes) -> None:
    """Write `data` in place and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Everything written so far is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """A rename within `path` is on the disk when this returns."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
