"""Pictures of the base and of the adapted model for the same prompts and seeds, and how their scores compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import UserError
from lora_dpo.evaluation.win_rate import compare, compare_details
from lora_dpo.progress import Progress
from lora_dpo.sampling import base_and_adapted, save_pngs
from lora_dpo.scorers import Scorer


@dataclass(frozen=True)
class Samples:
    """`prompts` and `seeds` per picture; `base` and `adapted` row by row of the same."""

    prompts: list[str]
    seeds: list[int]
    base: Float[Tensor, "n 3 H W"]
    adapted: Float[Tensor, "n 3 H W"]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, blank lines left out.

    Raises:
        UserError: unreadable, not UTF-8, or without a prompt.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read ({error})", where=path, hint="give a text file, one prompt a line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("there is no prompt in it", where=path, hint="give one prompt a line")
    return prompts


def first_distinct(prompts: Iterable[str], wanted: int) -> list[str]:
    """The first `wanted` different prompts; no more of them than that are looked at."""
    seen: dict[str, None] = {}
    if wanted > 0:
        for prompt in prompts:
            seen[prompt] = None
            if len(seen) == wanted:
                break
    return list(seen)


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    directory: Path,
    *,
    seeds_per_prompt: int,
    seed: int,
    steps: int,
    guidance: float,
    resolution: int,
    batch: int,
    progress: Progress,
) -> Samples:
    """Samples every prompt with the seeds `seed`, `seed + 1`, … on both sides, and saves `0000-base.png`, ….

    Raises:
        UserError: settings that the pipeline can't use, or a disk that is full.
        LoraDpoError: a picture that is not finite.
    """
    rows = [prompt for prompt in prompts for _ in range(seeds_per_prompt)]
    seeds = [seed + n for _ in prompts for n in range(seeds_per_prompt)]
    base, adapted = base_and_adapted(
        pipeline,
        rows,
        seeds,
        steps=steps,
        guidance=guidance,
        height=resolution,
        width=resolution,
        batch=batch,
        progress=progress,
    )
    with atomic.clear_os_errors(directory):
        for side, images in (("base", base), ("adapted", adapted)):
            about = [
                {"prompt": prompt, "seed": number, "steps": steps, "guidance": guidance, "side": side}
                for prompt, number in zip(rows, seeds, strict=True)
            ]
            save_pngs(images, directory, [f"{n:04d}-{side}" for n in range(len(rows))], about)
    return Samples(rows, seeds, base, adapted)


def judge(samples: Samples, scorer: Scorer, *, seed: int) -> dict[str, Any]:
    """The scorer's verdict as JSON values: `win_rate`, `score_base`, `score_adapted`, and all parts by name."""
    overall = compare(
        scorer(samples.adapted, samples.prompts), scorer(samples.base, samples.prompts), samples.prompts, seed=seed
    )
    parts = compare_details(
        scorer.details(samples.adapted, samples.prompts),
        scorer.details(samples.base, samples.prompts),
        samples.prompts,
        seed=seed,
    )
    return {
        "scorer": scorer.name,
        "win_rate": overall.win_rate,
        "win_rate_ci95": list(overall.ci95),
        "score_base": overall.mean_b,
        "score_adapted": overall.mean_a,
        "comparison": overall.to_json(),
        "categories": {name: part.to_json() for name, part in parts.items()},
    }
