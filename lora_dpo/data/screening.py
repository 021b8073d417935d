"""What every source checks alike: split, caption, label, pictures. Rows left out are counted with their reason."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_dpo.data import Preference, PreferenceSource, SourceReport, split_by_prompt
from lora_dpo.data.images import decode
from lora_dpo.errors import UserError
from lora_dpo.file_digests import file_digests

# Pillow decodes without Python's lock. Rows in flight are held with both their pictures decoded, 3 MB each at 1024².
DECODERS = min(8, os.cpu_count() or 1)
ROWS_AHEAD = 4 * DECODERS


Ties = Literal["drop", "half"]


@dataclass(frozen=True)
class Row:
    """A row as it was read: `label` is the probability that `images[0]` is the better one; 0.5 is a tie."""

    origin: str
    prompt: str
    images: tuple[bytes, bytes]
    label: float
    split: str | None = None
    user: str | None = None
    models: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Unusable:
    """A row that could not be read."""

    origin: str
    reason: str
    detail: str = ""
    split: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which rows of a source are wanted.

    Attributes:
        split: the wanted split; None takes every row.
        heldout_split: the name that means "held out" where the rows name no split of their own.
        heldout_fraction: share of prompts held out there, by `split_by_prompt`.
        seed: of that division.
        limit: at most so many kept pairs.
        ties: "drop" leaves them out; "half" keeps them, with the label ½.
    """

    split: str | None = None
    heldout_split: str = "heldout"
    heldout_fraction: float = 0.05
    seed: int = 0
    limit: int | None = None
    ties: Ties = "drop"

    def elsewhere(self, row: Row | Unusable) -> str | None:
        """The name of the split that the row belongs to, if it is not the wanted one."""
        if self.split is None:
            return None
        if row.split is not None:
            return None if row.split == self.split else row.split
        if isinstance(row, Unusable):
            return None
        side = split_by_prompt(row.prompt, self.heldout_fraction, self.seed)
        wanted: Literal["train", "heldout"] = "heldout" if self.split == self.heldout_split else "train"
        return None if side == wanted else side


class ScreenedSource(PreferenceSource):
    """A source that reads rows and leaves their judgement to this class."""

    def __init__(self, path: Path, selection: Selection) -> None:
        self.path = path
        self.selection = selection
        self.report = SourceReport()

    @abstractmethod
    def rows(self) -> Iterator[Row | Unusable]:
        """Every row, in the source's order."""

    def done(self) -> tuple[int, int | None]:
        """Rows, and of how many; with a limit, pairs, and of how many at most."""
        if self.selection.limit is None:
            return super().done()
        return self.report.kept, min(self.selection.limit, self.total_rows() or self.selection.limit)

    def __iter__(self) -> Iterator[Preference]:
        report = self.report = SourceReport()
        for row, judged in self._judged():
            if judged is None:
                report.elsewhere[str(self.selection.elsewhere(row))] += 1
                continue
            report.rows += 1
            if isinstance(judged, Unusable):
                report.drop(judged.reason, judged.origin, judged.detail)
                if self.dropped_row is not None:
                    self.dropped_row(judged.reason, judged.origin, judged.detail)
                continue
            report.kept += 1
            report.ties += judged.label == 0.5
            yield judged
            if report.kept == self.selection.limit:
                return
        if not report.kept:
            examples = [f"{reason}: {shown[0]}" for reason, shown in report.examples.items()]
            raise UserError(
                f"no usable pair: {report.summary()}",
                self.path,
                "for example " + "; ".join(examples) if examples else "choose another split or file",
            )

    def _judged(self) -> Iterator[tuple[Row | Unusable, Preference | Unusable | None]]:
        """Every row with its judgement, None for another split's; pictures are decoded some rows ahead."""
        pool = ThreadPoolExecutor(DECODERS, "decode")
        ahead: deque[tuple[Row | Unusable, Future[Preference | Unusable] | Unusable | None]] = deque()

        def first() -> tuple[Row | Unusable, Preference | Unusable | None]:
            row, judged = ahead.popleft()
            return row, judged.result() if isinstance(judged, Future) else judged

        damage: UserError | None = None
        try:
            try:
                for row in self.rows():
                    if self.selection.elsewhere(row) is not None:
                        ahead.append((row, None))
                    else:
                        ahead.append((row, row if isinstance(row, Unusable) else pool.submit(self._judge, row)))
                    if len(ahead) > ROWS_AHEAD:
                        yield first()
            except UserError as error:  # the rows before it are sound
                damage = error
            while ahead:
                yield first()
            if damage is not None:
                raise damage
        finally:
            pool.shutdown(cancel_futures=True)

    def _judge(self, row: Row) -> Preference | Unusable:
        if not row.prompt.strip():
            return Unusable(row.origin, "blank caption")
        if row.label == 0.5 and self.selection.ties == "drop":
            return Unusable(row.origin, "tie")
        if not 0 <= row.label <= 1:
            return Unusable(row.origin, "label out of range", f"got {row.label}, expected 0 to 1 (0.5: tie)")
        if row.images[0] == row.images[1]:
            return Unusable(row.origin, "identical images")
        (winner, loser), (its_model, other_model) = row.images, row.models
        if row.label < 0.5:
            winner, loser, its_model, other_model = loser, winner, other_model, its_model
        pictures = []
        for image in (winner, loser):
            try:
                seen = self.known is not None and self.known(image)
                pictures.append(None if seen else decode(image, row.origin))
            except UserError as error:
                return Unusable(row.origin, "undecodable image", error.what)
        label = max(row.label, 1 - row.label)
        decoded, models = (pictures[0], pictures[1]), (its_model, other_model)
        return Preference(row.prompt, winner, loser, row.origin, decoded, label, row.user, models)


def content_digest(files: Mapping[str, Path], *settings: object) -> str:
    """A digest of names, every byte of the files, and what is selected from them."""
    digest = hashlib.blake2b(repr(settings).encode("utf-8", "surrogatepass"), digest_size=16)
    for name, content in zip(files, file_digests(list(files.values())), strict=True):
        digest.update(f"\x1e{name}\x1f".encode("utf-8", "surrogatepass"))
        digest.update(content)
    return digest.hexdigest()
