"""Pairs from parquet in Pick-a-Pic's columns: `label_0 == 1` means that `jpg_0` is preferred, 0.5 is a tie."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from lora_dpo.data import parquet
from lora_dpo.data.screening import Row, ScreenedSource, Selection, Ties, Unusable, content_digest
from lora_dpo.errors import UserError

REQUIRED = ("jpg_0", "jpg_1", "label_0", "caption")
OPTIONAL = ("label_1", "has_label", "split")
# Told by `lora-dpo data check`; what is learned doesn't depend on them.
ABOUT = ("user_id", "model_0", "model_1")


class PickAPicParquet(ScreenedSource):
    """One parquet file, a directory of them, or a glob, read row group by row group.

    Args:
        path: the file, directory or glob; a directory is searched with its folders, files in the order of their names.
        columns: our column name → the file's, for those of jpg_0, jpg_1, label_0, label_1, caption, has_label and
            split that are called differently there. With label_0 renamed alone, label_1 is not looked at.
        filter: column → the value, or list of values, that a row must have.
        split, heldout_split, heldout_fraction, seed, limit, ties: see `Selection`; a `split` column comes first.

    Raises:
        UserError: no such file, a file that is no parquet, or columns that are missing or can't hold what they should.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        columns: Mapping[str, str] | None = None,
        filter: Mapping[str, Any] | None = None,
        split: str | None = None,
        heldout_split: str = "heldout",
        heldout_fraction: float = 0.05,
        seed: int = 0,
        limit: int | None = None,
        ties: Ties = "drop",
    ) -> None:
        super().__init__(Path(path), Selection(split, heldout_split, heldout_fraction, seed, limit, ties))
        renamed = dict(columns or {})
        if unknown := sorted(set(renamed) - {*REQUIRED, *OPTIONAL}):
            raise UserError(
                f"unknown column names to map: {', '.join(unknown)}", path, f"known: {', '.join(REQUIRED + OPTIONAL)}"
            )
        self._columns = {name: renamed.get(name, name) for name in REQUIRED + OPTIONAL}
        if "label_0" in renamed and "label_1" not in renamed:
            del self._columns["label_1"]
        self._filter = {
            name: list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
            for name, wanted in (filter or {}).items()
        }
        self._files = _files(self.path)
        self._check_columns(renamed)
        self._total: int | None = None

    def fingerprint(self) -> str:
        return content_digest(self._files, "pickapic", self._columns, self._filter, self.selection)

    def total_rows(self) -> int:
        if self._total is None:
            self._total = sum(map(parquet.number_of_rows, self._files.values()))
        return self._total

    def rows(self) -> Iterator[Row | Unusable]:
        for name, path in self._files.items():
            held = set(parquet.schema(path).names)
            wanted = self._columns | {name: name for name in ABOUT}
            columns = {ours: theirs for ours, theirs in wanted.items() if theirs in held}
            for start, batch in parquet.batches(path, [*{*columns.values(), *self._filter}]):
                yield from self._batch(batch, columns, name, start)

    def _batch(self, batch: pa.RecordBatch, columns: dict[str, str], name: str, start: int) -> Iterator[Row | Unusable]:
        values = {ours: parquet.values(batch.column(theirs)) for ours, theirs in columns.items()}
        chosen = {theirs: parquet.values(batch.column(theirs)) for theirs in self._filter}
        for index in range(batch.num_rows):
            if all(chosen[theirs][index] in wanted for theirs, wanted in self._filter.items()):
                yield _row({ours: column[index] for ours, column in values.items()}, f"{name}:{start + index}")
            else:
                yield Unusable(f"{name}:{start + index}", "filtered out", split=_split(values, index))

    def _check_columns(self, renamed: dict[str, str]) -> None:
        problems = []
        for name, path in self._files.items():
            schema = parquet.schema(path)
            wanted = {*REQUIRED, *renamed}
            missing = [self._columns[ours] for ours in REQUIRED + OPTIONAL if ours in wanted and ours in self._columns]
            missing = [theirs for theirs in [*missing, *self._filter] if theirs not in schema.names]
            if missing:
                problems.append(f"{name} has no column {', '.join(missing)} (it has {', '.join(schema.names)})")
            for ours in ("jpg_0", "jpg_1"):
                theirs = self._columns[ours]
                if theirs in schema.names and not _holds_bytes(kind := schema.field(theirs).type):
                    problems.append(f"{name}: column {theirs} holds {kind}, not image bytes")
        if problems:
            raise UserError("; ".join(problems), self.path, 'map the names with data.columns, e.g. caption = "prompt"')


def _files(path: Path) -> dict[str, Path]:
    """Name in reports → file, in a fixed order."""
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        found, root = sorted(path.rglob("*.parquet")), path
    elif glob.has_magic(str(path)):
        found, root = sorted(Path(name) for name in glob.glob(str(path), recursive=True)), None
    else:
        raise UserError("no such file or directory", path, "give a parquet file, a directory of them, or a glob")
    found = [file for file in found if file.is_file()]
    if not found:
        raise UserError("no parquet file here", path, "give a parquet file, a directory of them, or a glob")
    return {(file.relative_to(root) if root else file).as_posix(): file for file in found}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _split(values: Mapping[str, list[Any]], index: int) -> str | None:
    value = values["split"][index] if "split" in values else None
    return None if value is None else str(value)


def _row(row: dict[str, Any], origin: str) -> Row | Unusable:
    split = None if row.get("split") is None else str(row["split"])

    def unusable(reason: str, detail: str = "") -> Unusable:
        return Unusable(origin, reason, detail, split)

    caption = row["caption"]
    if isinstance(caption, bytes):
        return unusable("caption is not UTF-8", repr(caption[:40]))
    if not isinstance(caption, str):
        return unusable("missing caption", "" if caption is None else f"got {type(caption).__name__}")
    if row.get("has_label") is False:
        return unusable("missing label", "has_label is false")
    labels = [_number(row[name]) for name in ("label_0", "label_1") if name in row]
    decided = [label for label in labels if label is not None]
    if len(decided) < len(labels):
        return unusable("missing label", ", ".join(f"{n}={row[n]!r}" for n in ("label_0", "label_1") if n in row))
    if len(decided) == 2 and sum(decided) != 1:
        outside = any(label not in (0, 0.5, 1) for label in decided)
        return unusable("label out of range" if outside else "contradictory labels", f"{decided[0]} and {decided[1]}")
    images = [value.get("bytes") if isinstance(value := row[name], dict) else value for name in ("jpg_0", "jpg_1")]
    first, second = (image if isinstance(image, bytes) else b"" for image in images)
    if not first or not second:
        return unusable("missing image")
    user, *models = (None if (value := row.get(name)) is None else str(value) for name in ABOUT)
    return Row(origin, caption, (first, second), decided[0], split, user, (models[0], models[1]))


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number
