"""The data of a run before it is started: which pairs there will be, and what the cache will hold."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lora_dpo import cache_index, inputs, parts
from lora_dpo.buckets import Size, written
from lora_dpo.cache_fill import DUPLICATE, own_sizes
from lora_dpo.cache_store import digest
from lora_dpo.data import Preference, PreferenceSource, SourceReport
from lora_dpo.data.framing import TOO_SMALL, Framing
from lora_dpo.errors import UserError
from lora_dpo.file_digests import NotRemembered, only_remembered
from lora_dpo.progress import Progress
from lora_dpo.recipe import Recipe

SCAN_SECONDS = 10.0


@dataclass
class PlannedData:
    """The pairs to train on, as the cache has them or as far as the rows were read.

    Attributes:
        report: of the source, with exact duplicates and too small pictures among its dropped rows.
        sizes: pairs of each size.
        pictures, prompts: how many different ones.
        share: of the source's rows that were read, 1.0 where all were; None: not all, and it isn't known how many more.
        encoded: the cache holds them all.
    """

    report: SourceReport
    sizes: Counter[Size] = field(default_factory=Counter)
    pictures: int = 0
    prompts: int = 0
    share: float | None = 1.0
    encoded: bool = False

    def whole(self, count: int, at_most: int | None = None) -> int:
        """`count` for all rows, if the rest is like what was read; at least so many where that isn't known."""
        return min(round(count / (self.share or 1.0)), at_most or sys.maxsize)

    def pairs(self, limit: int | None) -> int:
        return self.whole(self.sizes.total(), limit)

    def to_json(self, path: str) -> dict[str, Any]:
        report = self.report
        return {
            "path": path,
            "rows": report.rows,
            "kept": report.kept,
            "dropped": dict(report.dropped),
            "elsewhere": dict(report.elsewhere),
            "share_read": None if self.share is None else round(self.share, 4),
            "from_cache": self.encoded,
            "summary": report.summary(),
        }

    def buckets(self, limit: int | None) -> dict[str, int]:
        """Pairs by width × height, the most frequent first."""
        pairs, read = self.pairs(limit), self.sizes.total()
        return {written(size): round(count * pairs / read) for size, count in self.sizes.most_common()}

    def cache(self, recipe: Recipe, picture_bytes: Callable[[Size], int], prompt_bytes: int) -> dict[str, Any]:
        """What the cache holds of these pairs, those held out not counted.

        Args:
            picture_bytes: of a picture at a size.
        """
        known, limit = self.sizes.total(), recipe.data.limit
        pictures = self.whole(self.pictures, None if limit is None else 2 * limit)
        prompts = self.whole(self.prompts, limit)
        each = sum(count * picture_bytes(size) for size, count in self.sizes.items()) / known
        return {
            "directory": str(parts.cache_dir(recipe)),
            "encoded": self.encoded,
            "pictures": pictures,
            "prompts": prompts,
            "bytes": round(pictures * each) + (prompts + 1) * prompt_bytes,
        }


def look(recipe: Recipe, progress: Progress) -> PlannedData:
    """From the cache's index where there is one, which knows every picture; else from the rows.

    Raises:
        UserError: data that can't be read, or without a usable pair.
    """
    return _from_cache(recipe) or scan(recipe, progress)


def _from_cache(recipe: Recipe) -> PlannedData | None:
    family = parts.family_here(recipe)
    if family is None:
        return None
    try:
        with only_remembered():
            path = inputs.indexes(recipe, family, parts.cache_dir(recipe))[inputs.TRAIN]
    except NotRemembered:  # the files were never used here, or have changed
        return None
    index = cache_index.read(path)
    if index is None:
        return None
    rows = cache_index.used_rows([index]).total()
    texts = len(index.prompts) + 1  # and the empty one
    return PlannedData(index.report, index.sizes(), rows - texts, len(index.prompts), encoded=True)


def scan(recipe: Recipe, progress: Progress, seconds: float = SCAN_SECONDS) -> PlannedData:
    """Reads rows for so long at most, and decodes no picture that tells its size without.

    Raises:
        UserError: data that can't be read, or without a usable pair.
    """
    source = parts.source(recipe, recipe.data.split)
    source.known = lambda _: True  # decoding is what takes the time
    progress.start(None, "reading rows")
    try:
        return _scanned(source, parts.framing(recipe), progress, time.monotonic() + seconds)
    finally:
        progress.stop()


def _scanned(source: PreferenceSource, framing: Framing, progress: Progress, until: float) -> PlannedData:
    found, dropped = PlannedData(source.report), list[tuple[str, str]]()
    pairs: set[str] = set()
    pictures: set[tuple[str, Size]] = set()
    prompts: set[str] = set()
    for preference in source:
        progress.advance()
        size = _size(preference, framing)
        if isinstance(size, str):
            dropped.append((size, preference.origin))
        else:
            sides = [digest(side) for side in (preference.winner, preference.loser)]
            pictures.update((side, size) for side in sides)
            pair = digest(preference.prompt, *sides, preference.label)
            if pair in pairs:
                dropped.append((DUPLICATE, preference.origin))
            else:
                pairs.add(pair)
                prompts.add(preference.prompt)
                found.sizes[size] += 1
        if time.monotonic() > until:
            found.share = source.share_read()
            break
    found.report, found.pictures, found.prompts = source.report, len(pictures), len(prompts)
    for reason, origin in dropped:
        found.report.kept -= 1
        found.report.drop(reason, origin)
    if not pairs:
        raise UserError("the source has no usable pair", hint=found.report.summary())
    return found


def _size(preference: Preference, framing: Framing) -> Size | str:
    """Of the pair's training pictures; else why it is left out."""
    try:
        own = own_sizes(preference) if framing.looks else ()
    except UserError:
        return "undecodable image"
    size = framing.size_for(own)
    return TOO_SMALL if framing.drops(own, size) else size
