"""Pairs from a JSON-lines file beside its images.

A line is `{"prompt": …, "winner": "a.png", "loser": "b.png"}`, or `{"prompt": …, "image_a": …, "image_b": …,
"preference": "a" | "b" | "tie"}`; a number from 0 to 1 is the probability that a is better, such as a share of votes. A
"split" of its own is optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dpo.data.screening import Row, ScreenedSource, Selection, Ties, Unusable, content_digest
from lora_dpo.errors import UserError

PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
USUAL_NAMES = ("pairs.jsonl", "metadata.jsonl")


class _BadLine(Exception):
    """Why a line can't be used: (reason, detail)."""


class JsonlFolder(ScreenedSource):
    """A JSONL file, or the directory that holds one; image paths are relative to it and may not leave it.

    Args:
        path: the file, or a directory with `pairs.jsonl`, `metadata.jsonl` or one other `*.jsonl`.
        split, heldout_split, heldout_fraction, seed, limit, ties: see `Selection`; a row's own "split" comes first.

    Raises:
        UserError: no such file, or a directory in which it isn't clear which file is meant.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        split: str | None = None,
        heldout_split: str = "heldout",
        heldout_fraction: float = 0.05,
        seed: int = 0,
        limit: int | None = None,
        ties: Ties = "drop",
    ) -> None:
        super().__init__(_jsonl(Path(path)), Selection(split, heldout_split, heldout_fraction, seed, limit, ties))
        self._root = self.path.parent.resolve()
        self._total: int | None = None

    def fingerprint(self) -> str:
        files = {self.path.name: self.path}
        for _, record in self._lines():
            for key in ("winner", "loser", "image_a", "image_b"):
                try:
                    file = self._inside(record[key]) if isinstance(record, dict) and key in record else None
                except _BadLine:
                    continue  # It is counted when the rows are read; without a file there are no bytes to digest.
                if file is not None:
                    files[record[key]] = file
        return content_digest(files, "folder", self.selection)

    def rows(self) -> Iterator[Row | Unusable]:
        for number, record in self._lines():
            origin = f"{self.path.name}:{number}"
            split = record.get("split") if isinstance(record, dict) else None
            split = split if isinstance(split, str) else None
            try:
                yield self._row(record, origin, split)
            except _BadLine as bad:
                reason, detail = bad.args
                yield Unusable(origin, reason, detail, split)

    def total_rows(self) -> int:
        if self._total is None:
            self._total = sum(1 for _ in self._texts())
        return self._total

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """(line number from 1, its JSON value or the _BadLine it is); blank lines are no rows."""
        for number, text in self._texts():
            try:
                yield number, json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield number, _BadLine("not JSON", str(error))

    def _texts(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if text.strip():
                        yield number, text
        except OSError as error:
            raise UserError(f"can't be read ({error.strerror})", self.path) from error

    def _row(self, record: Any, origin: str, split: str | None) -> Row:
        if isinstance(record, _BadLine):
            raise record
        if not isinstance(record, dict):
            raise _BadLine("not a JSON object", type(record).__name__)
        prompt = record.get("prompt")
        if not isinstance(prompt, str):
            raise _BadLine("missing caption", f"prompt is {prompt!r}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadLine("caption is not UTF-8", error.reason) from error
        if "winner" in record or "loser" in record:
            names, label = ("winner", "loser"), 1.0
        else:
            names, label = ("image_a", "image_b"), _preference(record)
        if missing := [name for name in names if name not in record]:
            raise _BadLine("missing key", ", ".join(missing))
        first, second = (self._bytes(record[name]) for name in names)
        return Row(origin, prompt, (first, second), label, split)

    def _inside(self, name: Any) -> Path:
        if not isinstance(name, str) or not name:
            raise _BadLine("missing image", f"expected a path, got {name!r}")
        try:
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root):
                raise _BadLine("image outside the folder", name)
            if not path.is_file():
                raise _BadLine("missing image", f"no file {name}")
        except (OSError, ValueError, RuntimeError) as error:
            raise _BadLine("missing image", f"{name!r}: {error}") from error
        return path

    def _bytes(self, name: Any) -> bytes:
        try:
            return self._inside(name).read_bytes()
        except OSError as error:
            raise _BadLine("missing image", f"{name}: {error.strerror}") from error


def _preference(record: dict[str, Any]) -> float:
    value = record.get("preference")
    if isinstance(value, str) and value in PREFERENCES:
        return PREFERENCES[value]
    # JSON's true would pass for 1.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise _BadLine("bad preference", f'got {value!r}, expected "a", "b", "tie" or a number from 0 to 1')


def _jsonl(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("no such file or directory", path, "give a JSONL file or the folder that holds it")
    found = sorted(path.glob("*.jsonl"))
    usual = [path / name for name in USUAL_NAMES if path / name in found]
    if not found:
        raise UserError("no .jsonl file in this folder", path, f"name it {USUAL_NAMES[0]}")
    if len(found) > 1 and not usual:
        names = ", ".join(file.name for file in found)
        raise UserError(f"several .jsonl files in this folder ({names})", path, "name the one you mean")
    return usual[0] if usual else found[0]
