"""`lora-dpo data check`: reads all of a source once and tells what is in it, whatever is wrong with single rows."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_dpo import atomic, contact_sheet, parts
from lora_dpo import recipe as recipes
from lora_dpo.buckets import written
from lora_dpo.cache_store import digest
from lora_dpo.data import Preference, PreferenceSource, SourceReport
from lora_dpo.data.lookalikes import Look, look
from lora_dpo.data.recognise import recognise
from lora_dpo.errors import UserError
from lora_dpo.progress import make_progress
from lora_dpo.randomness import seed_of
from lora_dpo.recipe_toml import shipped_names

MOST = 20
COMPARED = 16
COUNT_BITS = 20
MASK = (1 << COUNT_BITS) - 1
OUT_HINT = "choose another file, or change the permissions"


def run(
    target: str,
    overrides: Sequence[str] = (),
    *,
    rows_file: Path | None = None,
    sheet: Path | None = None,
    sheet_pairs: int = 24,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """What the source of a recipe, or at a path, holds; see docs/preferences.md.

    Args:
        target: a recipe, as everywhere, or data.
        rows_file: where every row that is left out goes, one JSON object a line.
        sheet: a PNG of `sheet_pairs` random pairs, always the same for a seed.

    Raises:
        UserError: there are no data, or files can't be written. Rows and files that are damaged are in the document.
    """
    source, kind, place = _open(target, overrides)
    seen = _Seen(sheet_pairs if sheet is not None else 0, seed)
    progress = make_progress(quiet=quiet)
    error = None
    with _Rows(rows_file) as rows:
        source.dropped_row = rows.write
        progress.start(source.done()[1], "reading rows")
        try:
            told = 0
            for preference in source:
                seen.add(preference)
                done = source.done()[0]
                progress.advance(done - told)
                told = done
            if rest := source.done()[0] - told:  # dropped after the last that is kept
                progress.advance(rest)
        except UserError as problem:
            error = str(problem)
        finally:
            progress.stop()
    if sheet is not None and seen.sample():
        contact_sheet.save(seen.sample(), sheet, f"{place} · {seen.pairs:,} pairs")
    document = {"path": place, "kind": kind, "error": error, **_counts(source.report), **seen.to_json()}
    document["rows_file"] = None if rows_file is None else str(rows_file)
    document["sheet"] = None if sheet is None or not seen.pairs else str(sheet)
    return document


def _open(target: str, overrides: Sequence[str]) -> tuple[PreferenceSource, str, str]:
    """(source, kind, where)."""
    if target.endswith(".toml") or (target in shipped_names() and not Path(target).exists()):
        recipe = recipes.load(target, overrides)
        return parts.source(recipe, recipe.data.split), recipe.data.kind, recipe.data.path
    if overrides:
        raise UserError("a path takes no section.key=value", target, "give a recipe, or leave them out")
    kind = recognise(Path(target))
    return parts.source_at(kind, Path(target)), kind, target


def _counts(report: SourceReport) -> dict[str, Any]:
    return {
        "rows": report.rows,
        "kept": report.kept,
        "ties": report.ties,
        "dropped": dict(report.dropped.most_common()),
        "examples": report.examples,
        "elsewhere": dict(report.elsewhere),
    }


class _Rows:
    """The file of dropped rows, complete or absent."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._part = path, None if path is None else path.with_name(f".{path.name}{atomic.PARTIAL}")
        self._file: IO[str] | None = None

    def __enter__(self) -> _Rows:
        if self._part is not None:
            with atomic.clear_os_errors(self._part, OUT_HINT):
                self._file = self._part.open("w", encoding="utf-8", errors="surrogateescape")
        return self

    def write(self, reason: str, origin: str, detail: str) -> None:
        if self._file is not None:
            print(json.dumps({"row": origin, "reason": reason, "detail": detail}), file=self._file)

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is None or self._part is None or self._path is None:
            return
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


@dataclass
class _Seen:
    """What the kept pairs have shown so far; some hundred bytes of it for each pair and picture."""

    sheet_pairs: int
    seed: int
    pairs: int = 0
    near_pairs: int = 0
    prompts: set[bytes] = field(default_factory=set)
    users: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    looks: dict[str, Look] = field(default_factory=dict)
    judged: dict[bytes, int] = field(default_factory=dict)  # three counts in one number: there may be millions
    _sample: list[tuple[int, int, Preference]] = field(default_factory=list)

    def add(self, pair: Preference) -> None:
        self.pairs += 1
        names = [digest(side) for side in (pair.winner, pair.loser)]
        for name, picture in zip(names, pair.pictures, strict=True):
            if name not in self.looks and picture is not None:
                self.looks[name] = look(picture)
                self.sizes[picture.height, picture.width] += 1
        self.near_pairs += self.looks[names[0]].alike(self.looks[names[1]])
        self.prompts.add(bytes.fromhex(digest(pair.prompt)))
        if pair.user is not None:
            self.users[pair.user] += 1
        self.models.update(model for model in pair.models if model is not None)
        # 0: the first by name is the better one; 1: the second; 2: a tie.
        verdict = 2 if pair.label == 0.5 else int(names[0] > names[1])
        key = bytes.fromhex(digest(pair.prompt, *sorted(names)))
        before = self.judged.get(key, 0)
        self.judged[key] = before + (1 << verdict * COUNT_BITS)
        if self.sheet_pairs and not before:
            # The smallest of so many digests: a draw that doesn't depend on the order of the rows.
            drawn = seed_of(self.seed, "contact sheet", pair.prompt.encode("utf-8").hex(), *names)
            held = Preference(pair.prompt, pair.winner, pair.loser, pair.origin, label=pair.label)
            push = heapq.heappush if len(self._sample) < self.sheet_pairs else heapq.heappushpop
            push(self._sample, (-drawn, self.pairs, held))

    def sample(self) -> list[Preference]:
        return [pair for _, _, pair in sorted(self._sample, reverse=True)]

    def to_json(self) -> dict[str, Any]:
        once = {1 << verdict * COUNT_BITS for verdict in range(3)}
        again = [
            [held >> verdict * COUNT_BITS & MASK for verdict in range(3)]
            for held in self.judged.values()
            if held not in once
        ]
        ratios = Counter[float]()
        for (height, width), count in self.sizes.items():
            ratios[round(width / height, 2)] += count
        return {
            "prompts": len(self.prompts),
            "pictures": len(self.looks),
            "users": _most(self.users),
            "models": _most(self.models),
            "sizes": _most(Counter({written(size): count for size, count in self.sizes.items()})),
            "aspect_ratios": _most(Counter({f"{ratio:g}": count for ratio, count in ratios.items()})),
            "duplicates": {
                "rows": sum(count - 1 for counts in again for count in counts if count),
                "pictures_that_look_like_another": _repeats(self.looks.values()),
                "pairs_that_look_alike": self.near_pairs,
            },
            "judged_again": _noise(again),
        }


def _repeats(looks: Iterable[Look]) -> int:
    """Pictures that look like an earlier one, as far as a few comparisons each can tell: never all against all."""
    earlier: dict[bytes, list[Look]] = {}
    repeats = 0
    for one in looks:
        near = [earlier.setdefault(key, []) for key in one.near_keys()]
        if any(one.alike(other) for others in near for other in others):
            repeats += 1
            continue
        for others in near:
            if len(others) < COMPARED:
                others.append(one)
    return repeats


def _most(counts: Counter[str]) -> dict[str, Any]:
    return {"different": len(counts), "most": dict(counts.most_common(MOST))}


def _noise(again: list[list[int]]) -> dict[str, Any]:
    """How often two judgements of the same pair differ, ties left out; and the share of wrong labels that explains it.

    If each label is wrong with probability ε, on its own, two of them differ with 2 ε (1 − ε).
    """
    couples = sum(math.comb(first + second, 2) for first, second, _ in again)
    differ = sum(first * second for first, second, _ in again)
    share = differ / couples if couples else None
    noise = None if share is None else (1 - math.sqrt(max(0.0, 1 - 2 * share))) / 2
    return {"pairs": len(again), "couples": couples, "differ": share, "label_noise": noise}
