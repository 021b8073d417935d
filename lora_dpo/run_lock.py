"""One process at a time in a run directory: the operating system's lock, which dies with its holder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import IO, Any

from lora_dpo import atomic
from lora_dpo.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Scope in which no other process is in `directory`, which is made if need be.

    The lock is the kernel's (flock), not the file: whoever dies lets go of it, and a file left behind blocks nobody.

    Raises:
        UserError: another process is there, which is named; or the directory can't be written.
    """
    path = directory / LOCK
    with atomic.clear_os_errors(directory):
        if directory.exists() and not directory.is_dir():
            raise UserError("this is a file", where=directory, hint="give a folder as --run-dir")
        directory.mkdir(parents=True, exist_ok=True)
        file = _acquired(path)
    try:
        yield
    finally:
        # Removed while it is still held; whoever opened it meanwhile sees that it is no longer the directory's.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _acquired(path: Path) -> IO[bytes]:
    while True:
        file = path.open("ab+")
        try:
            # Without locks, as on some network file systems, training goes on; `lora-dpo doctor` tells.
            if try_lock(file) is Answer.ANOTHERS:
                raise UserError(
                    f"another process is at work in this run directory: {_holder(path)}",
                    where=path.parent,
                    hint="wait until it is done, stop it, or give another --run-dir",
                )
            with contextlib.suppress(OSError):  # on Windows an open file can't be removed, nor its entry change
                if not _same(file, path):
                    file.close()
                    continue
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            file.truncate(0)
            file.write(json.dumps(about).encode())
            file.flush()
            return file
        except BaseException:
            file.close()
            raise


def _same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        return f"pid {about['pid']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not yet written who it is"


class Answer(Enum):
    """Of the operating system, asked for a lock."""

    OURS = auto()
    ANOTHERS = auto()
    UNSUPPORTED = auto()  # the file system has none


if sys.platform == "win32":
    import msvcrt

    def try_lock(file: IO[bytes] | int, *, shared: bool = False) -> Answer:
        """Asks for the lock of an open file, which lasts until the file is closed or the process dies."""
        if shared:
            return Answer.UNSUPPORTED
        descriptor = file if isinstance(file, int) else file.fileno()
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # a byte that nobody writes: locked ones can't be read by others
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return Answer.ANOTHERS
        return Answer.OURS
else:
    import errno
    import fcntl

    def try_lock(file: IO[bytes] | int, *, shared: bool = False) -> Answer:
        """Asks for the lock of an open file, which lasts until the file is closed or the process dies.

        Args:
            shared: others may have it too, if they share it.
        """
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return Answer.ANOTHERS
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            return Answer.UNSUPPORTED
        return Answer.OURS
