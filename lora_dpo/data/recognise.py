"""Which `data.kind` a file or directory is of, from what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lora_dpo.data import parquet
from lora_dpo.data.folder import COLUMNS, has_columns
from lora_dpo.data.tables import SUFFIXES, open_table
from lora_dpo.data.two_folders import SIDES
from lora_dpo.errors import UserError

Kind = Literal["pickapic", "folder", "hpdv2"]
_BEGINNING = 1 << 16


def recognise(path: Path) -> Kind:
    """The kind of a source.

    Raises:
        UserError: nothing there is of any kind, or several things of different ones.
    """
    if path.is_file():
        kind = _of_file(path)
        if kind is None:
            raise UserError("neither pairs nor rankings are in this file", path, "docs/preferences.md has the forms")
        return kind
    if not path.is_dir():
        raise UserError(
            "no such file or directory", path, "give a recipe, a file of pairs, or the directory that holds it"
        )
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in (*SUFFIXES, ".json"))
    kinds: dict[Kind, str] = {kind: file.name for file in reversed(files) if (kind := _of_file(file)) is not None}
    if not kinds and all((path / side).is_dir() for side in SIDES):
        return "folder"
    if not kinds and any(_of_file(file) == "pickapic" for file in sorted(path.rglob("*.parquet"))[:1]):
        return "pickapic"
    if len(kinds) == 1:
        return next(iter(kinds))
    if kinds:
        names = ", ".join(f"{file} is of kind {kind}" for kind, file in sorted(kinds.items()))
        raise UserError(f"this directory holds several kinds of data ({names})", path, "name the file you mean")
    raise UserError("no pairs and no rankings are in this directory", path, "docs/preferences.md has the forms")


def _of_file(path: Path) -> Kind | None:
    try:
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", path) from error
    if beginning.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        names = parquet.schema(path).names
        return "folder" if has_columns(names) else "pickapic"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "folder" if has_columns(open_table(path, COLUMNS).names()) else None
    text = beginning.decode("utf-8-sig", "replace").lstrip()
    if text.startswith("["):
        return "hpdv2" if text[1:].lstrip()[:1] == "{" else None
    if any(f'"{key}"' in text for key in ("rank", "human_preference")) and '"image_a"' not in text:
        return "hpdv2"
    return "folder" if any(_is_pair(line) for line in text.splitlines()) else None


def _is_pair(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and has_columns(list(record))
