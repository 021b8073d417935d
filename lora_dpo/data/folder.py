"""Pairs from a table beside its pictures: JSON lines, CSV or parquet.

A row is `{"prompt": …, "winner": "a.png", "loser": "b.png"}`, or `{"prompt": …, "image_a": …, "image_b": …,
"preference": "a" | "b" | "tie"}`; a number from 0 to 1 is the probability that a is better, such as a share of votes. A
"split" of its own is optional. A table's columns have these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dpo.data.picture_files import BadRow, DataDirectory, prompt_of, shown
from lora_dpo.data.screening import Row, ScreenedSource, Selection, Ties, Unusable, content_digest
from lora_dpo.data.tables import SUFFIXES, Table, open_table
from lora_dpo.data.two_folders import SIDES, TwoFolders
from lora_dpo.errors import UserError

PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
USUAL_NAMES = ("pairs", "metadata")
JUDGED, COMPARED = ("winner", "loser"), ("image_a", "image_b", "preference")
COLUMNS = ("prompt", *JUDGED, *COMPARED, "split")
NEEDED = "prompt, winner, loser, or prompt, image_a, image_b, preference"


def open_folder(
    path: Path | str,
    *,
    split: str | None = None,
    heldout_split: str = "heldout",
    heldout_fraction: float = 0.05,
    seed: int = 0,
    limit: int | None = None,
    ties: Ties = "drop",
) -> ScreenedSource:
    """A table, or the directory that holds one, or one with `winners/` and `losers/` (see `TwoFolders`).

    Args:
        path: the file, or a directory with one `pairs.*`, one `metadata.*` or one other table, or with the two folders.
        split, heldout_split, heldout_fraction, seed, limit, ties: see `Selection`; a row's own "split" comes first.

    Raises:
        UserError: no such file; a directory in which it isn't clear which file is meant; a table without the columns.
    """
    selection = Selection(split, heldout_split, heldout_fraction, seed, limit, ties)
    found = _table(Path(path))
    return TwoFolders(Path(path), selection) if found is None else TableFolder(found, selection)


class TableFolder(ScreenedSource):
    """A table; paths of pictures are relative to its directory and may not leave it."""

    def __init__(self, path: Path, selection: Selection) -> None:
        super().__init__(path, selection)
        self._root = DataDirectory(path.parent)
        self._table = open_table(path, COLUMNS)
        self._total: int | None = None
        _check_columns(self._table)

    def fingerprint(self) -> str:
        files = {self.path.name: self.path}
        for _, record in self._table:
            for key in (*JUDGED, *COMPARED[:2]):
                try:
                    file = self._root.inside(record[key]) if isinstance(record, dict) and key in record else None
                except BadRow:
                    continue  # It is counted when the rows are read; without a file there are no bytes to digest.
                if file is not None:
                    files[record[key]] = file
        return content_digest(files, "folder", self.selection)

    def rows(self) -> Iterator[Row | Unusable]:
        for number, record in self._table:
            origin = f"{self.path.name}:{number}"
            split = record.get("split") if isinstance(record, dict) else None
            split = split if isinstance(split, str) else None
            try:
                yield self._row(record, origin, split)
            except BadRow as bad:
                reason, detail = bad.args
                yield Unusable(origin, reason, detail, split)

    def total_rows(self) -> int:
        if self._total is None:
            self._total = len(self._table)
        return self._total

    def _row(self, record: Any, origin: str, split: str | None) -> Row:
        if isinstance(record, BadRow):
            raise record
        if not isinstance(record, dict):
            raise BadRow("not a JSON object", type(record).__name__)
        prompt = prompt_of(record.get("prompt"))
        if "winner" in record or "loser" in record:
            names, label = JUDGED, 1.0
        else:
            names, label = COMPARED[:2], _preference(record)
        if missing := [name for name in names if name not in record]:
            raise BadRow("missing key", ", ".join(missing))
        first, second = (self._root.read(record[name]) for name in names)
        return Row(origin, prompt, (first, second), label, split)


def _preference(record: dict[str, Any]) -> float:
    value = record.get("preference")
    if isinstance(value, str) and (word := value.strip().lower()) in PREFERENCES:
        return PREFERENCES[word]
    # JSON's true would pass for 1.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise BadRow("bad preference", f'got {shown(value)}, expected "a", "b", "tie" or a number from 0 to 1')


def has_columns(names: list[str] | None) -> bool:
    """Whether these are the columns of pairs; a table whose rows have each their own may have them."""
    return names is None or any({"prompt", *form} <= set(names) for form in (JUDGED, COMPARED))


def _may_be_meant(file: Path) -> bool:
    """Not a table of other columns, such as Pick-a-Pic's; one that can't be read may be."""
    try:
        return has_columns(open_table(file, COLUMNS).names())
    except UserError:
        return True


def _check_columns(table: Table) -> None:
    names = table.names()
    if names is not None and not has_columns(names):
        raise UserError(
            f"expected the columns {NEEDED}; it has {', '.join(map(shown, names[:40])) or 'none'}",
            table.path,
            'pictures inside a parquet file are of data.kind = "pickapic"',
        )


def _table(path: Path) -> Path | None:
    """The table that is meant; None for the layout of two folders."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("no such file or directory", path, "give a table or the folder that holds it")
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    tables = [file for file in tables if _may_be_meant(file)] or tables
    found = next((named for stem in USUAL_NAMES if (named := [file for file in tables if file.stem == stem])), tables)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"several tables in this folder ({names})", path, "name the one you mean")
    if not found and not all((path / side).is_dir() for side in SIDES):
        raise UserError(
            f"no table in this folder ({', '.join(SUFFIXES)})",
            path,
            f"name it pairs.jsonl, or have {SIDES[0]}/ and {SIDES[1]}/",
        )
    return found[0] if found else None
