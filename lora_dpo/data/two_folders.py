"""Pairs from two folders, `winners/` and `losers/`: pictures of one name are a pair, a `.txt` of that name its caption.

The caption lies beside either picture or in the folder above, at the same place below it. Several that say the same are
one; several that differ make the pair unusable. Files of other endings are left alone.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lora_dpo.data.picture_files import BadRow, DataDirectory
from lora_dpo.data.screening import Row, ScreenedSource, Selection, Unusable, content_digest
from lora_dpo.errors import UserError

SIDES = ("winners", "losers")
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
CAPTION = ".txt"


class TwoFolders(ScreenedSource):
    """The directory that holds both; folders inside them are searched too, and names are compared in Unicode's NFC.

    Raises:
        UserError: no picture in either of them.
    """

    def __init__(self, path: Path, selection: Selection) -> None:
        super().__init__(path, selection)
        self._root = DataDirectory(path)
        self._pictures = [_by_name(path, side, PICTURES) for side in SIDES]
        self._captions = [_by_name(path, place, {CAPTION}) for place in (*SIDES, "")]
        self._names = sorted({name for side in self._pictures for name in side})
        if not self._names:
            raise UserError(
                f"no picture in {SIDES[0]}/ and {SIDES[1]}/", path, f"known are {', '.join(sorted(PICTURES))}"
            )

    def total_rows(self) -> int:
        return len(self._names)

    def fingerprint(self) -> str:
        files = {}
        for name in self._names:
            for folder in (*self._pictures, *self._captions):
                for path in folder.get(name, ()):
                    try:
                        files[path] = self._root.inside(path)
                    except BadRow:
                        continue  # It is counted when the rows are read.
        return content_digest(files, "two folders", self._names, self.selection)

    def rows(self) -> Iterator[Row | Unusable]:
        for name in self._names:
            origin = next(side[name][0] for side in self._pictures if name in side)
            try:
                winner, loser = (self._picture(side, name) for side in (0, 1))
                yield Row(origin, self._caption(name), (self._root.read(winner), self._root.read(loser)), 1.0)
            except BadRow as bad:
                reason, detail = bad.args
                yield Unusable(origin, reason, detail)

    def _picture(self, side: int, name: str) -> str:
        found = self._pictures[side].get(name, [])
        if not found:
            raise BadRow("missing image", f"no picture {name} in {SIDES[side]}/")
        if len(found) > 1:
            raise BadRow("several images of one name", ", ".join(found))
        return found[0]

    def _caption(self, name: str) -> str:
        texts: dict[str, str] = {}
        for folder in self._captions:
            for path in folder.get(name, ()):
                texts.setdefault(self._root.caption(path), path)
        if not texts:
            raise BadRow("missing caption", f"no {name}{CAPTION}")
        if len(texts) > 1:
            raise BadRow("contradictory captions", ", ".join(texts.values()))
        return next(iter(texts))


def _by_name(root: Path, folder: str, suffixes: frozenset[str] | set[str]) -> dict[str, list[str]]:
    """Path below `folder` without its ending, as NFC → the files' paths below `root`, in order."""
    found: dict[str, list[str]] = {}
    for place, inner, files in os.walk(root / folder, onerror=_unreadable):
        below = Path(place).relative_to(root / folder).as_posix()
        if not folder and below == ".":
            inner[:] = [name for name in inner if name not in SIDES]
        for file in files:
            path = PurePosixPath(below, file)
            if path.suffix.lower() in suffixes and not file.startswith("."):
                name = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
                found.setdefault(name, []).append(PurePosixPath(folder, path).as_posix())
    return {name: sorted(paths) for name, paths in found.items()}


def _unreadable(error: OSError) -> None:
    raise UserError(f"can't be read ({error.strerror})", error.filename) from error
