"""`lora-dpo cache`: encodes a recipe's pairs ahead of training, checks them, tells what is there, clears out.

The denoiser is never loaded here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any

from lora_dpo import cache_files, cache_index, cache_use, inputs, parts
from lora_dpo.cache import CachedPairs
from lora_dpo.cache_files import Group, Pairs
from lora_dpo.cache_store import Damaged, discard
from lora_dpo.distributed import connect
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Family
from lora_dpo.progress import NoProgress, Progress, make_progress
from lora_dpo.recipe import Recipe

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Wanted:
    """What the command shall do; nothing of this: fill.

    Attributes:
        all_but_this, unused_days: with `prune`, what other recipes use goes too: all of it, or what wasn't used for so
            many days.
        yes: delete that; without it, it is listed.
    """

    verify: bool = False
    prune: bool = False
    stats: bool = False
    all_but_this: bool = False
    unused_days: float | None = None
    yes: bool = False

    @property
    def fill(self) -> bool:
        return not (self.verify or self.prune or self.stats)

    @property
    def others(self) -> bool:
        return self.all_but_this or self.unused_days is not None

    def require(self) -> None:
        """UserError for an option that would have no effect."""
        if self.others and not self.prune:
            raise UserError("this belongs to --prune", where="--all-but-this" if self.all_but_this else "--unused-days")
        if self.all_but_this and self.unused_days is not None:
            raise UserError("it includes --unused-days", where="--all-but-this", hint="give one of them")
        if self.yes and not self.others:
            raise UserError("there is nothing to confirm: --prune alone deletes what no recipe can use", where="--yes")


def run(recipe: Recipe, wanted: Wanted, *, quiet: bool = False) -> dict[str, Any] | None:
    """Fills, or does what is wanted in the order verify, prune, stats.

    Under torchrun or `accelerate launch` the processes divide the filling; the rest is the main one's.

    Returns:
        by "filled", "verified", "pruned" and "stats" what was done and found, for JSON; None beside the main process.

    Raises:
        UserError: input that can't be used, a cache that isn't filled yet or can't be written.
        LoraDpoError: what was encoded isn't finite, or damage that can't be mended.
    """
    wanted.require()
    processes, device = connect(parts.device(recipe.train.device))
    progress = make_progress(quiet=quiet) if processes.is_main else NoProgress()
    family, directory = parts.family(recipe, device), parts.cache_dir(recipe)
    document: dict[str, Any] = {"directory": str(directory)}
    try:
        if wanted.fill:
            document["filled"] = processes.together(partial(_fill, recipe, family, directory, progress), patient=True)
        if wanted.verify:
            document["verified"] = processes.on_main(partial(_verify, recipe, family, directory, progress))
        if wanted.prune or wanted.stats:
            own = inputs.indexes(recipe, family, directory)
        if wanted.prune:
            document["pruned"] = processes.on_main(partial(_prune, directory, own, wanted, progress))
        if wanted.stats:
            document["stats"] = processes.on_main(partial(_stats, directory, own, progress))
    finally:
        progress.stop()
    processes.close()
    return document if processes.is_main else None


def _fill(recipe: Recipe, family: Family, directory: Path, progress: Progress) -> dict[str, Any]:
    began, done = time.monotonic(), {}
    for name, filled in ((inputs.TRAIN, inputs.pairs), (inputs.HELD_OUT, inputs.held_out_pairs)):
        pairs = filled(recipe, family, directory, progress)
        if pairs is not None:
            progress.message(f"{name}: {pairs.report.summary()}")
            done[name] = _filled(pairs, directory)
            pairs.close()
    return {"pairs": done, "seconds": round(time.monotonic() - began, 2)}


def _filled(pairs: CachedPairs, directory: Path) -> dict[str, Any]:
    return {
        "pairs": len(pairs),
        "prompts": len(pairs.prompts),
        "rows": pairs.report.rows,
        "dropped": dict(pairs.report.dropped),
        "shards": len(pairs.shards()),
        "bytes": sum((directory / name).stat().st_size for name in pairs.shards()),
        "encoded": {what: pairs.encoded[what] for what in ("pictures", "prompts")},
    }


def _verify(recipe: Recipe, family: Family, directory: Path, progress: Progress) -> dict[str, Any]:
    """Every row that the recipe uses; what is damaged is encoded again, and read again."""
    paths = list(inputs.indexes(recipe, family, directory).values())
    if not any(path.exists() for path in paths):
        raise UserError(
            "this recipe's pairs are not in the cache yet", where=directory, hint="fill it first: without --verify"
        )
    unreadable = [path for path in paths if cache_index.read(path) is None]
    damages = [Damaged(path, "it can't be read") for path in unreadable if path.exists()]
    if unreadable:
        # Without them it can't be told what the recipe uses. They are made from the shards, which hold all rows.
        _again(damages, recipe, family, directory, progress)
    shards = sorted({name for path in paths for name in _opened(path).shards})
    size = sum((directory / name).stat().st_size for name in shards if (directory / name).exists())
    found = cache_files.verify(directory, shards, inputs.count(progress))
    if found:
        _again(found, recipe, family, directory, progress)
        for damage in found:
            # A shard that isn't there has given its rows to another.
            name = damage.path.relative_to(directory).as_posix()
            if damage.path.exists() and cache_files.verify(directory, [name]):
                raise LoraDpoError(
                    f"{damage.path}: still damaged after encoding it again\n  → see that the disk is sound, and that "
                    "the cache can be written"
                )
    damaged = [
        {"file": damage.path.relative_to(directory).as_posix(), "reason": damage.reason} for damage in damages + found
    ]
    return {"shards": len(shards), "bytes": size, "damaged": damaged}


def _again(damages: Sequence[Damaged], recipe: Recipe, family: Family, directory: Path, progress: Progress) -> None:
    for damage in damages:
        progress.message(f"{damage.path.relative_to(directory).as_posix()} is damaged: {damage.reason}")
        discard(damage.path)
    _fill(recipe, family, directory, progress)


def _opened(path: Path) -> cache_index.Index:
    index = cache_index.read(path)
    if index is None:
        raise LoraDpoError(f"{path}: damaged again as soon as it was written\n  → see that the disk is sound")
    return index


def _prune(directory: Path, own: dict[str, Path], wanted: Wanted, progress: Progress) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError("there is no cache here", where=directory)

    def stays(pairs: Pairs) -> bool:
        if wanted.unused_days is None:
            return not wanted.all_but_this
        return pairs.last_use is None or time.time() - pairs.last_use < wanted.unused_days * DAY_SECONDS

    with cache_use.pruning(directory):
        found = cache_files.survey(directory, list(own.values()), inputs.count(progress))
        plan = cache_files.to_prune(found, stays)
        result = {
            "deleted": not wanted.others or wanted.yes,
            "files": len(plan.files),
            "bytes": sum(size for size, _ in plan.files.values()),
            "reasons": {
                reason: {"files": files, "bytes": size} for reason, (files, size) in sorted(plan.reasons().items())
            },
            "pairs": [_described(pairs) for pairs in found.pairs if pairs.path in plan.files],
            "kept_bytes": plan.kept_bytes,
        }
        if result["deleted"]:
            sizes = {path: size for path, (size, _) in plan.files.items()}
            freed, failed = cache_files.delete(directory, sizes, inputs.count(progress))
            result |= {"bytes": freed, "failed": [str(path) for path in failed]}
    return result


def _stats(directory: Path, own: dict[str, Path], progress: Progress) -> dict[str, Any]:
    found = cache_files.survey(directory, list(own.values()), inputs.count(progress))
    plan = cache_files.to_prune(found)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return {
        "bytes": sum(sum(part.sizes.values()) for part in (*found.groups, *found.references)),
        "free_bytes": disk_usage(there).free,
        "groups": [_group(group) for group in found.groups],
        "pairs": [_described(pairs) for pairs in found.pairs],
        "references": [
            {
                "name": references.name,
                "about": references.about,
                "visits": len(references.sizes),
                "bytes": sum(references.sizes.values()),
            }
            for references in found.references
        ],
        "this_recipe": {name: path.name if path.exists() else None for name, path in own.items()},
        "prunable_files": len(plan.files),
        "prunable_bytes": sum(size for size, _ in plan.files.values()),
        "unfinished_bytes": plan.kept_bytes,
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "about": group.about,
        "rows": sum(rows for rows in group.rows.values() if rows is not None),
        "rows_of_this_recipe": group.used,
        "shards": len(group.sizes),
        "damaged_shards": sum(rows is None for rows in group.rows.values()),
        "bytes": sum(group.sizes.values()),
        "last_use": _time(group.last_use),
        "in_use": group.in_use,
    }


def _described(pairs: Pairs) -> dict[str, Any]:
    index = pairs.index
    return {
        "name": pairs.path.name,
        "about": pairs.about,
        "pairs": len(index) if index is not None else None,
        "prompts": len(index.prompts) if index is not None else None,
        "shards": len(index.shards) if index is not None else None,
        "this_recipe": pairs.own,
        "last_use": _time(pairs.last_use),
        "in_use": pairs.in_use,
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
