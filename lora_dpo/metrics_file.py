"""`metrics.jsonl`: one JSON object per optimizer step, whole lines only, never two for a step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_dpo import atomic

HELD_OUT = "heldout_"  # before the names of what is measured on held-out pairs


class MetricsFile:
    """In append mode, cut on opening to the lines up to `step`.

    Raises:
        UserError: disk full, or the directory can't be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step
        self._file: TextIO | None = None

    def __enter__(self) -> MetricsFile:
        with atomic.clear_os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                old = self._path.read_bytes()
                kept = b"".join(_lines_up_to(old, self._step))
                if kept != old:
                    atomic.replace(self._path, kept)
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # What a full disk refused was said by `write`; the torn line is cut when the run resumes.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def lines(self) -> list[dict[str, Any]]:
        """What is in it."""
        return [json.loads(line) for line in self._path.read_bytes().splitlines()]

    def cut(self, step: int) -> None:
        """Back to the lines up to `step`."""
        self.__exit__()
        self._step = step
        self.__enter__()

    def write(self, line: Mapping[str, float | int]) -> None:
        with atomic.clear_os_errors(self._path):
            print(json.dumps(line), file=self._file, flush=True)

    def flush(self) -> None:
        """On the disk before the checkpoint is: a resumed run finds every line up to its step."""
        if self._file is not None:
            with atomic.clear_os_errors(self._path):
                atomic.sync(self._file)


def _lines_up_to(data: bytes, step: int) -> Iterator[bytes]:
    for line in data.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError):
            continue  # torn by the kill
