"""Records of a table, one after another: JSON lines, CSV or parquet, each with its place; a broken one costs itself."""

from __future__ import annotations

import contextlib
import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_dpo.data import parquet
from lora_dpo.data.picture_files import BadRow
from lora_dpo.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# A quote that is never closed would make one record of all that follows.
LINES_PER_RECORD = 32
NUMBERS = ("preference",)
Records = Iterator[tuple[int, Any]]


class Table(ABC):
    """A file of records.

    Args:
        columns: those that anybody asks for; others needn't be read.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns

    @abstractmethod
    def __iter__(self) -> Records:
        """(line or row number, the record as a JSON value or the BadRow that it is)."""

    def names(self) -> list[str] | None:
        """The columns there are; None if every record has its own."""
        return None

    def __len__(self) -> int:
        return sum(1 for _ in self)


def open_table(path: Path, columns: Sequence[str]) -> Table:
    """By the name's ending; any other file is read as JSON lines.

    Raises:
        UserError: no parquet in spite of its name, or a CSV without a header.
    """
    match path.suffix.lower():
        case ".parquet":
            return _Parquet(path, columns)
        case ".csv" | ".tsv":
            return _Csv(path, columns)
        case _:
            return _JsonLines(path, columns)


class _Lines(Table):
    def lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except OSError as error:
            raise UserError(f"can't be read ({error.strerror})", self.path) from error


class _JsonLines(_Lines):
    """Numbered from 1; blank lines are no rows."""

    def __iter__(self) -> Records:
        for number, line in self.lines():
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    yield number, BadRow("not JSON", str(error))

    def __len__(self) -> int:
        return sum(1 for _, line in self.lines() if line.strip())


class _Csv(_Lines):
    """Numbered by a record's first line, from 1. Commas, semicolons or tabs, whichever the header has most of.

    Bytes that aren't UTF-8 become surrogates, which stand for the same bytes in file names. An empty cell is a column
    that the row doesn't have. A record that can't be read costs its first line: reading goes on with the second.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(path, columns)
        first = next((_decoded(line) for _, line in self.lines() if line.strip()), "")
        self._delimiter = max(",;\t", key=first.count)
        try:
            self._header = [name.strip() for name in self._parsed([first])]
        except csv.Error as error:
            raise UserError(f"the header can't be read ({error})", path) from error
        if twice := sorted({name for name in self._header if name and self._header.count(name) > 1}):
            raise UserError(f"the header names {', '.join(twice)} twice", path)

    def names(self) -> list[str]:
        return self._header

    def __iter__(self) -> Records:
        lines = ((number, _decoded(line)) for number, line in self.lines())
        next((number for number, text in lines if text.strip()), None)  # the header
        ahead: list[tuple[int, str]] = []
        while ahead or (ahead := list(islice(lines, 1))):
            number, text = ahead[0]
            taken = 1
            if text.strip():
                record, taken = self._next(ahead, lines)
                yield number, record
            del ahead[:taken]

    def _next(self, ahead: list[tuple[int, str]], more: Iterator[tuple[int, str]]) -> tuple[Any, int]:
        """The record that begins with the first line, and of how many lines it is; `ahead` grows as far as needed."""
        for taken in range(1, LINES_PER_RECORD + 1):
            if len(ahead) < taken:
                ahead += islice(more, 1)
            if len(ahead) < taken:
                break
            try:
                return self._record([text for _, text in ahead[:taken]]), taken
            except _Open:
                continue
            except BadRow as bad:
                return bad, 1
        return BadRow("not CSV", "a quote is never closed"), 1

    def _record(self, lines: list[str]) -> dict[str, Any]:
        try:
            cells = self._parsed(lines)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise _Open from None
            raise BadRow("not CSV", str(error)) from error
        if len(cells) != len(self._header):
            raise BadRow("wrong number of columns", f"{len(cells)}, expected {len(self._header)}")
        pairs = zip(self._header, cells, strict=True)
        found: dict[str, Any] = {name: cell for name, cell in pairs if name in self.columns and cell}
        for name in NUMBERS:
            with contextlib.suppress(KeyError, ValueError):
                found[name] = float(found[name])
        return found

    def _parsed(self, lines: list[str]) -> list[str]:
        return next(csv.reader(lines, delimiter=self._delimiter, strict=True))


class _Open(Exception):
    """A record that goes on in the next line."""


class _Parquet(Table):
    """Numbered from 0, as everything reads parquet."""

    def names(self) -> list[str]:
        return parquet.schema(self.path).names

    def __iter__(self) -> Records:
        held = self.names()
        columns = [name for name in self.columns if name in held]
        for start, batch in parquet.batches(self.path, columns):
            read = [parquet.values(batch.column(name)) for name in columns]
            for number, cells in enumerate(zip(*read, strict=True), start=start):
                yield number, {name: cell for name, cell in zip(columns, cells, strict=True) if cell is not None}

    def __len__(self) -> int:
        return parquet.number_of_rows(self.path)


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")
