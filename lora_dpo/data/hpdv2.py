"""Pairs from rankings in the JSON of Human Preference Dataset v2 (Wu et al. 2023, arXiv:2306.09341).

An entry of `train.json` is `{"prompt": …, "file_path": [two paths], "human_preference": [1, 0]}`, 1 for the better one;
an entry of `test.json` is `{"prompt": …, "image_path": [paths], "rank": [numbers]}`, the smallest rank for the best.
Equal ranks are a tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lora_dpo.data import json_stream
from lora_dpo.data.picture_files import BadRow, DataDirectory, prompt_of, shown
from lora_dpo.data.screening import Row, ScreenedSource, Selection, Ties, Unusable, content_digest
from lora_dpo.errors import UserError

Pairs = Literal["all", "adjacent", "best_worst"]
MAX_PICTURES = 100  # of a ranking; all pairs of so many are 4950
FORMS = (("file_path", "human_preference"), ("image_path", "rank"))


class Rankings(ScreenedSource):
    """A JSON file of rankings, or the directory that holds one or more.

    Paths of pictures are relative to the file's directory, or to the folder there that is called as the file is:
    `train/` for `train.json`. An origin is "file:entry:first>second", with the numbers of the pictures, all from 0.

    Args:
        path: of several files in a directory each is the split of its name; those of one are divided by prompt.
        pairs: which pairs of a ranking are taken. "all": every one; "adjacent": each place with the next;
            "best_worst": the first place with the last.
        split, heldout_split, heldout_fraction, seed, limit, ties: see `Selection`.

    Raises:
        UserError: no such file, no JSON in the directory, or none for a split.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        pairs: Pairs = "all",
        split: str | None = None,
        heldout_split: str = "heldout",
        heldout_fraction: float = 0.05,
        seed: int = 0,
        limit: int | None = None,
        ties: Ties = "drop",
    ) -> None:
        super().__init__(Path(path), Selection(split, heldout_split, heldout_fraction, seed, limit, ties))
        self._pairs: Pairs = pairs
        found = _files(self.path)
        self._has_splits = len(found) > 1
        if self._has_splits and split is not None:
            if split not in found:
                raise UserError(
                    f"no {split}.json in this folder (there are {', '.join(f'{name}.json' for name in found)})",
                    self.path,
                    'with several files, data.split and data.heldout_split name them, e.g. data.heldout_split = "test"',
                )
            found = {split: found[split]}
        self._files = found
        self._total: int | None = None

    def fingerprint(self) -> str:
        files = {file.name: file for file in self._files.values()}
        for file in self._files.values():
            root = _Pictures(file)
            for _, entry in _entries(file):
                for name in entry.images if isinstance(entry, _Ranking) else ():
                    try:
                        files[name] = root.inside(name)
                    except BadRow:
                        continue  # It is counted when the rows are read.
        return content_digest(files, "hpdv2", self._pairs, self.selection)

    def total_rows(self) -> int:
        if self._total is None:
            self._total = sum(
                len(chosen_pairs(entry.places, self._pairs)) if isinstance(entry, _Ranking) else 1
                for file in self._files.values()
                for _, entry in _entries(file)
            )
        return self._total

    def rows(self) -> Iterator[Row | Unusable]:
        for name, file in self._files.items():
            root, split = _Pictures(file), name if self._has_splits else None
            for number, entry in _entries(file):
                origin = f"{file.name}:{number}"
                if isinstance(entry, BadRow):
                    yield Unusable(origin, *entry.args, split=split)
                    continue
                read = cache(root.read)  # of an entry's pictures, which are in several pairs
                for first, second in chosen_pairs(entry.places, self._pairs):
                    label = 0.5 if entry.places[first] == entry.places[second] else 1.0
                    place = f"{origin}:{first}>{second}"
                    try:
                        pictures = read(entry.images[first]), read(entry.images[second])
                        yield Row(place, entry.prompt, pictures, label, split)
                    except BadRow as bad:
                        yield Unusable(place, *bad.args, split=split)


def chosen_pairs(places: tuple[float, ...], pairs: Pairs) -> list[tuple[int, int]]:
    """(better, worse) pictures of a ranking by their numbers; of equal ones the earlier comes first.

    Args:
        places: of each picture; the smallest is the best.
    """
    order = sorted(range(len(places)), key=lambda picture: (places[picture], picture))
    match pairs:
        case "all":
            return list(itertools.combinations(order, 2))
        case "adjacent":
            return list(itertools.pairwise(order))
        case "best_worst":
            return [(order[0], order[-1])]


class _Ranking:
    """An entry that can be used."""

    def __init__(self, entry: Any) -> None:
        """BadRow if it can't."""
        if not isinstance(entry, dict):
            raise BadRow("not a JSON object", type(entry).__name__)
        self.prompt = prompt_of(entry.get("prompt"))
        for images, places in FORMS:
            if images in entry and places in entry:
                break
        else:
            raise BadRow("missing key", " or ".join(f"{images} and {places}" for images, places in FORMS))
        self.images, values = entry[images], entry[places]
        if not isinstance(self.images, list) or not isinstance(values, list) or len(self.images) != len(values):
            raise BadRow("bad ranking", f"{images} and {places} have to be lists of one length")
        if not 2 <= len(values) <= MAX_PICTURES:
            raise BadRow("bad ranking", f"{len(values)} pictures, expected 2 to {MAX_PICTURES}")
        if bad := [value for value in values if not _number(value)]:
            raise BadRow("bad ranking", f"{places} holds {shown(bad[0])}")
        if bad := [name for name in self.images if not isinstance(name, str)]:
            raise BadRow("missing image", f"expected a path, got {shown(bad[0])}")
        self.places: tuple[float, ...] = tuple(value if places == "rank" else -value for value in values)


class _Pictures(DataDirectory):
    def __init__(self, file: Path) -> None:
        super().__init__(file.parent)
        self._folder = file.stem

    def inside(self, name: Any) -> Path:
        try:
            return super().inside(name)
        except BadRow as bad:
            if bad.args[0] == "missing image" and isinstance(name, str) and name:
                return super().inside(f"{self._folder}/{name}")
            raise


def _entries(file: Path) -> Iterator[tuple[int, _Ranking | BadRow]]:
    for number, value in enumerate(json_stream.values(file)):
        try:
            yield number, value if isinstance(value, BadRow) else _Ranking(value)
        except BadRow as bad:
            yield number, bad


def _number(value: Any) -> bool:
    # A whole number may be too large for a float.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and not math.isnan(value)
    )


def _files(path: Path) -> dict[str, Path]:
    """The split that it would be → the file."""
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise UserError("no such file or directory", path, "give a JSON file of rankings or the folder that holds it")
    found = {file.stem: file for file in sorted(path.glob("*.json")) if file.is_file()}
    if not found:
        raise UserError("no .json file in this folder", path, "HPDv2 has train.json and test.json")
    return found
