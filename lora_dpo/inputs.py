"""What a run reads: its pairs, the held-out ones, and the prompts to sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_dpo import parts, report
from lora_dpo.buckets import written
from lora_dpo.cache import CachedPairs, fill, index_path
from lora_dpo.data import BAD_IMAGES, PreferenceSource, SourceReport
from lora_dpo.errors import UserError
from lora_dpo.evaluation import samples
from lora_dpo.families import Family
from lora_dpo.progress import Progress
from lora_dpo.recipe import Recipe

TRAIN, HELD_OUT = "train", "heldout"


def pairs(recipe: Recipe, family: Family, directory: Path, progress: Progress) -> CachedPairs:
    """The pairs to train on, encoded."""
    found = _filled(recipe, TRAIN, family, directory, progress)
    _require_images(recipe, found.report)
    return found


def indexes(recipe: Recipe, family: Family, directory: Path) -> dict[str, Path]:
    """The cache's files that stand for the pairs to train on and for those held out, present or not."""
    wanted = [TRAIN, HELD_OUT] if recipe.evaluate.implicit_pairs else [TRAIN]
    return {name: index_path(_source(recipe, name), family, directory, parts.framing(recipe)) for name in wanted}


def _source(recipe: Recipe, name: str) -> PreferenceSource:
    if name == TRAIN:
        return parts.source(recipe, recipe.data.split)
    return parts.source(recipe, recipe.data.heldout_split, recipe.evaluate.implicit_pairs)


def _filled(recipe: Recipe, name: str, family: Family, directory: Path, progress: Progress) -> CachedPairs:
    return fill(
        _source(recipe, name),
        family,
        directory,
        parts.framing(recipe),
        count(progress),
        tell=progress.message,
        about=f"{recipe.data.path}, {name}",
    )


def tell(pairs: CachedPairs, family: Family, progress: Progress) -> int:
    """Says how many there are, what was dropped, their buckets, and how many captions the text encoders cut.

    Returns:
        the last.
    """
    progress.message(pairs.report.summary())
    sizes = pairs.sizes()
    if len(sizes) > 1:
        progress.message("buckets: " + ", ".join(f"{written(size)} {count:,}" for size, count in sizes.most_common()))
    cut = len(family.cut_prompts(pairs.prompts))
    if cut:
        progress.message(report.cut_captions(cut, len(pairs.prompts)))
    return cut


def held_out_pairs(recipe: Recipe, family: Family, directory: Path, progress: Progress) -> CachedPairs | None:
    """The pairs of the evaluation; None if the recipe wants none."""
    if not recipe.evaluate.implicit_pairs:
        return None
    try:
        found = _filled(recipe, HELD_OUT, family, directory, progress)
    except UserError as error:
        hint = "name the split with data.heldout_split, or set evaluate.implicit_pairs=0 and evaluate.prompts=0"
        raise UserError(f"no held-out pairs: {error.what}", where=error.where, hint=error.hint or hint) from error
    _require_images(recipe, found.report)
    return found


def _require_images(recipe: Recipe, report: SourceReport) -> None:
    """UserError if the recipe doesn't put up with the pictures that were dropped; all were looked at by then."""
    bad = [reason for reason in BAD_IMAGES if report.dropped[reason]]
    if bad and recipe.data.on_bad_image == "error":
        counts = ", ".join(f"{report.dropped[reason]:,} {reason}" for reason in bad)
        raise UserError(
            f"pictures that can't be used: {counts}; for example {report.examples[bad[0]][0]}",
            where=recipe.data.path,
            hint='mend them (`lora-dpo data check --rows FILE` lists them all), or give data.on_bad_image = "skip"',
        )


def prompts(recipe: Recipe, kept_out: CachedPairs | None) -> list[str]:
    """The prompts to sample: the file's, or the first distinct ones among the held-out pairs.

    Args:
        kept_out: the first held-out pairs; the source is read again only if they have too few prompts.
    """
    wanted = recipe.evaluate.prompts
    if recipe.evaluate.prompts_file is not None:
        found = iter(samples.read_prompts(Path(recipe.evaluate.prompts_file)))
    elif kept_out is not None and len(kept_out.prompts) >= wanted:
        found = iter(kept_out.prompts)
    else:
        found = (pair.prompt for pair in parts.source(recipe, recipe.data.heldout_split))
    return samples.first_distinct(found, wanted)


def count(progress: Progress) -> Callable[[int, int | None, str], None]:
    """A (done, total, what) callback as jobs of `progress`."""
    what, seen = None, 0

    def show(done: int, total: int | None, now: str) -> None:
        nonlocal what, seen
        if now != what:
            progress.stop()
            progress.start(total, now)
            what, seen = now, 0
        if done > seen:
            progress.advance(done - seen)
            seen = done
        if done == total:
            progress.stop()

    return show
