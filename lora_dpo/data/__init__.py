"""Preference pairs: what a source yields, what it reports, and which prompts are held out."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from PIL.Image import Image

from lora_dpo.randomness import seed_of

EXAMPLES_PER_REASON = 5
# Reasons to drop a row that are about a picture.
BAD_IMAGES = ("undecodable image", "missing image", "image outside the folder", "several images of one name")


@dataclass(frozen=True)
class Preference:
    """One comparison: encoded pictures, the first of them preferred.

    Attributes:
        origin: "file:row".
        pictures: winner and loser decoded, where the source had to do that anyway.
        label: the probability that the first is the better one, ½ … 1; ½ is a tie.
        user, models: who judged and what made the pictures, where the source says so.
    """

    prompt: str
    winner: bytes
    loser: bytes
    origin: str
    pictures: tuple[Image | None, Image | None] = field(default=(None, None), compare=False, repr=False)
    label: float = 1.0
    user: str | None = field(default=None, compare=False)
    models: tuple[str | None, str | None] = field(default=(None, None), compare=False)


@dataclass
class SourceReport:
    """What became of every row: `rows` = `kept` + the sum of `dropped`.

    Attributes:
        rows: rows of the chosen split.
        kept: rows that became a Preference.
        ties: how many of these are ties.
        dropped: number of rows by reason.
        examples: by reason, the first few origins with what was found there.
        elsewhere: rows of other splits; they count nowhere else.
    """

    rows: int = 0
    kept: int = 0
    ties: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, origin: str, detail: str = "") -> None:
        """Counts a row that is left out, and keeps it as an example while there are few."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append(f"{origin}: {detail}" if detail else origin)

    def summary(self) -> str:
        """One line, e.g. "1000 rows: 912 kept, 80 tie, 8 undecodable image"."""
        kept = f"{self.kept} kept" + (f" ({self.ties} ties)" if self.ties else "")
        parts = [kept, *(f"{count} {reason}" for reason, count in self.dropped.most_common())]
        elsewhere = ", ".join(f"{count} in split {name!r}" for name, count in self.elsewhere.most_common())
        return f"{self.rows} rows: {', '.join(parts)}" + (f" (beside them {elsewhere})" if elsewhere else "")


class PreferenceSource(ABC):
    """Pairs in a fixed order. Each iteration starts `report` afresh and fills it.

    Attributes:
        known: true of encoded pictures that were decoded before, so that a source needn't do it again to see whether
            they are sound; None: every picture is looked at.
        dropped_row: called with (reason, origin, detail) of every row that is left out.
    """

    report: SourceReport
    known: Callable[[bytes], bool] | None = None
    dropped_row: Callable[[str, str, str], None] | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Preference]:
        """Yields the usable rows; raises UserError where none is left."""

    def total_rows(self) -> int | None:
        """Of every split; None where that takes reading them."""
        return None

    def share_read(self) -> float | None:
        """Of all rows, how much the iteration that goes on has read; None where it can't be told."""
        total = self.total_rows()
        return (self.report.rows + self.report.elsewhere.total()) / total if total else None

    def done(self) -> tuple[int, int | None]:
        """How far the iteration that goes on is: rows, and of how many."""
        return self.report.rows + self.report.elsewhere.total(), self.total_rows()

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes with any byte of the source and with what is selected from it."""


def split_by_prompt(prompt: str, heldout_fraction: float, seed: int) -> Literal["train", "heldout"]:
    """Which side a prompt is on, from the prompt alone: no prompt is on both, whatever the rows' order or number.

    Prompts that a text encoder reads as the same (case, white space, Unicode form) share a side.
    """
    same = " ".join(unicodedata.normalize("NFC", prompt).casefold().split())
    return "heldout" if seed_of(seed, "heldout", same) < heldout_fraction * 2**63 else "train"
