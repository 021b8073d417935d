"""Ctrl-C and SIGTERM: the first unwinds whatever is going on, the second leaves at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_dpo.errors import LoraDpoError


class Interrupted(LoraDpoError):
    """A run was asked to stop and can be resumed.

    Args:
        number: the signal; the exit code is 128 + it, as shells count: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Stop(KeyboardInterrupt):
    """Raised by the first signal, wherever the program is. A KeyboardInterrupt, so that nothing takes it for an error.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Scope in which Ctrl-C and SIGTERM raise `Stop` once; a second one ends the process there and then.

    Gives a function that tells which signal came; 0: none.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: received  # signals go to the main thread; its owner decides there
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Stop(number)

    try:
        for number in numbers:
            # A script's background job is started with Ctrl-C ignored: it is not meant.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


GRACE_SECONDS = 2.0


@contextmanager
def at_once() -> Iterator[None]:
    """Scope in which a second Ctrl-C or SIGTERM ends the process within seconds, whatever it is doing.

    Python's handlers run between two of its instructions: not during a backward pass, which takes as long as it takes,
    and there two signals count as one. So they are counted by a thread, which ends the process where the handlers have
    not done so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()
    observer = threading.Thread(target=_observe, args=(reader, ended), name="signals", daemon=True)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    observer.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()
        observer.join()
        reader.close()


def _observe(reader: socket.socket, ended: threading.Event) -> None:
    echo_seconds = ECHO_SECONDS if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0.0
    first: float | None = None
    while received := reader.recv(1):
        number = received[0]
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first >= echo_seconds and not ended.wait(GRACE_SECONDS):
            shown = b"\x1b[?25h\n" if sys.stderr.isatty() else b""  # a progress bar hides the cursor
            os.write(2, shown + b"lora-dpo: stopped at once; the same command resumes where it can\n")
            os._exit(128 + number)


# A launcher's Ctrl-C reaches its processes twice: from the terminal and from the launcher, which passes it on.
ECHO_SECONDS = 3.0


@contextmanager
def stop_requests(echo_seconds: float = 0.0) -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM ask once; after that the previous handlers are back, so a second one leaves at once.

    Gives a function that tells which signal asked; 0: none.

    Args:
        echo_seconds: a second one within this time is taken for the first.
    """
    asked, asked_at = 0, 0.0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked  # signals go to the main thread; its owner decides there
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        nonlocal asked, asked_at
        if asked:
            if time.monotonic() - asked_at > echo_seconds:
                restore()
                signal.raise_signal(number)
            return
        asked, asked_at = number, time.monotonic()
        if not echo_seconds:
            restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step; once more to stop at once, unsaved\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()
