"""What a long job shows: a live bar on a terminal, plain parseable lines elsewhere, or nothing.

The jobs know the `Progress` protocol only; neither torch nor rich is imported here until a bar is drawn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


@runtime_checkable
class Progress(Protocol):
    """One job after another: `start`, many `advance`, `stop`. `message` may come at any time.

    A total of None is unknown; `done` of it were done before, and say nothing about the time that is left. What has to
    be done again is an `advance` by less than 0.
    """

    def start(self, total: int | None, what: str, done: int = 0) -> None: ...

    def advance(self, n: int = 1, **metrics: float) -> None: ...

    def message(self, text: str) -> None: ...

    def stop(self) -> None: ...


def make_progress(stream: TextIO | None = None, quiet: bool = False) -> Progress:
    """The fitting one for `stream` (standard error by default); `quiet` keeps messages and drops the rest."""
    shown: TextIO = sys.stderr if stream is None else stream
    if not quiet and shown.isatty():
        return RichProgress(shown)
    return PlainProgress(shown, quiet=quiet)


class NoProgress:
    """Nothing: another process shows it."""

    def start(self, total: int | None, what: str, done: int = 0) -> None: ...

    def advance(self, n: int = 1, **metrics: float) -> None: ...

    def message(self, text: str) -> None: ...

    def stop(self) -> None: ...


class PlainProgress:
    """`what=train done=20 total=100 per_second=1.5 eta_seconds=53 loss=0.69`: one line now and then.

    A line is written for the first advance, then every `interval_seconds`, and for the last.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._interval, self._clock = quiet, interval_seconds, clock
        self._what, self._done, self._made, self._start = "", 0, 0, 0.0
        self._total: int | None = 0
        self._last: float | None = None

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        self._what, self._total, self._done, self._made, self._last = what, total, done, 0, None
        self._start = self._clock()

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._done += n
        self._made += max(n, 0)
        now = self._clock()
        unfinished = self._total is None or self._done < self._total
        if self._last is not None and now - self._last < self._interval and unfinished:
            return
        self._last = now
        fields: dict[str, object] = {"what": self._what.replace(" ", "_"), "done": self._done}
        if self._total is not None:
            fields["total"] = self._total
        if now > self._start and self._made:
            rate = self._made / (now - self._start)
            fields["per_second"] = f"{rate:.4g}"
            if self._total is not None:
                fields["eta_seconds"] = f"{(self._total - self._done) / rate:.0f}"
        fields |= {name: f"{value:.5g}" for name, value in metrics.items()}
        if not self._quiet:
            self._write(" ".join(f"{name}={value}" for name, value in fields.items()))

    def message(self, text: str) -> None:
        self._write(text)

    def stop(self) -> None:
        self._what, self._last = "", None

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


_SHORT = {"implicit_accuracy": "accuracy", "heldout_accuracy": "held-out", "peak_memory_gib": "GiB"}
# rich estimates the time that is left from the steps within so many seconds; its 30 hold none of a slow machine's.
_PERIOD_SECONDS = 900


class RichProgress:
    """A live bar with rate, remaining time and the latest metrics."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stderr if stream is None else stream)
        self._bar: Bar | None = None
        self._start, self._made = 0.0, 0

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.stop()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            speed_estimate_period=_PERIOD_SECONDS,
        )
        self._bar.add_task(what, total=total, completed=done, rate="", metrics="")
        self._start, self._made = time.monotonic(), 0
        self._bar.start()

    def advance(self, n: int = 1, **metrics: float) -> None:
        if self._bar is None:
            return
        self._made += max(n, 0)
        seconds = time.monotonic() - self._start
        rate = _rate(self._made / seconds) if seconds > 0 and self._made else ""
        text = "  ".join(f"{_SHORT.get(name, name)} {value:.4g}" for name, value in metrics.items())
        self._bar.update(self._bar.task_ids[0], advance=n, rate=rate, metrics=text)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _rate(per_second: float) -> str:
    return f"{per_second:.2f}/s" if per_second >= 1 else f"{1 / per_second:.3g} s each"
