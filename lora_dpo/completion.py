"""What follows training: export, verification, evaluation and report."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_dpo import __version__, atomic, cache, export, figures, kohya, parts, peak_memory, report
from lora_dpo import run_dir as run_dirs
from lora_dpo.adapters import Adapters
from lora_dpo.data import SourceReport
from lora_dpo.evaluation import samples
from lora_dpo.evaluation.held_out import HeldOut, held_out
from lora_dpo.families import Family
from lora_dpo.methods.losses import sum_form_beta
from lora_dpo.progress import Progress
from lora_dpo.recipe import Recipe
from lora_dpo.run_dir import ADAPTER, CARD, CURVES, GRID, KOHYA, METRICS, SAMPLES
from lora_dpo.train import TrainResult


def complete(
    recipe: Recipe,
    run_dir: Path,
    family: Family,
    adapters: Adapters,
    start: dict[str, str] | None,
    pairs: cache.CachedPairs,
    cut: int,
    kept_out: cache.CachedPairs | None,
    prompts: list[str],
    trained: TrainResult,
    device: torch.device,
    progress: Progress,
    began: float,
    encoding_gib: float,
) -> dict[str, Any]:
    """Export, verification, evaluation and report of a trained adapter: the content of `result.json`."""
    peak_memory.restart(device)
    kept = pairs.report
    metadata = parts.metadata(recipe, family, start)
    file = export.save(adapters, run_dir / ADAPTER, metadata)
    kohya_file = run_dir / KOHYA / f"{recipe.name}.safetensors"
    try:
        kohya.save(adapters.state_dict(), adapters.scale * adapters.rank, family, kohya_file, metadata)
    except kohya.NotInKohyasLayout as error:
        progress.message(f"no file in kohya's layout: {error}")
        kohya_file = None
    implicit = None
    if kept_out is not None:
        implicit = implicit_accuracy(recipe, family, adapters, kept_out, progress=progress)
    probe = export.probe(pairs, family)
    verified = export.verify(adapters, family, file, probe)
    progress.message(f"{file} is verified: stock diffusers predicts the same to {verified.difference:.1e}")
    if kohya_file is not None:
        kohya_file = kohya.keep_if_same(family, kohya_file, probe, progress.message)

    result: dict[str, Any] = {
        "name": recipe.name,
        "adapter": file.relative_to(run_dir).as_posix(),
        "adapter_kohya": kohya_file.relative_to(run_dir).as_posix() if kohya_file else None,
        "base": str(parts.base(recipe)),
        "base_options": parts.base_options(recipe),
        "pipeline": type(family.pipeline()).__name__,
        "example_prompt": (prompts or pairs.prompts)[0],
        "sampling": {**recipe.evaluate.model_dump(include={"steps", "guidance"}), "resolution": recipe.data.resolution},
        "win_rate": None,
        "win_rate_ci95": None,
        "score_base": None,
        "score_adapted": None,
        "start": start,
        "reference": parts.reference(recipe),
        "steps": trained.steps,
        "exported_step": trained.exported_step,
        "rollbacks": trained.rollbacks,
        "pairs": len(pairs),
        "data": {
            "rows": kept.rows,
            "kept": kept.kept,
            "dropped": dict(kept.dropped),
            "summary": kept.summary(),
            "captions": len(pairs.prompts),
            "captions_cut": cut,
        },
        "buckets": [
            {"width": width, "height": height, "pairs": count} for (height, width), count in pairs.sizes().most_common()
        ],
        "latent_shape": [family.latent_channels, *[recipe.data.resolution // family.latent_scale] * 2],
        "verification": asdict(verified),
        "implicit": implicit.to_json() if implicit is not None else None,
        "held_out_by_step": run_dirs.held_out_by_step(run_dir),
    }
    if prompts:
        result |= _evaluate(recipe, run_dir, family, prompts, progress)
    earlier = run_dirs.train_seconds(run_dir, trained.resumed_from)
    memory = {
        "encoding": encoding_gib,
        "training": max(trained.peak_memory_gib, run_dirs.training_gib(run_dir)),
        "evaluation": peak_memory.gib(device),
    }
    result |= {
        "seconds": round(time.monotonic() - began + earlier, 2),
        "train_seconds": round(run_dirs.train_seconds(run_dir, trained.steps), 2),
        "peak_memory_gib": round(max(memory.values()), 3),
        "peak_memory_gib_of": {name: round(gib, 3) for name, gib in memory.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"lora-dpo": __version__, "torch": torch.__version__},
    }
    figures.curves(run_dir / METRICS, run_dir / CURVES, title=recipe.name)
    write_card(recipe, run_dir, result, repo=None)
    run_dirs.finish(run_dir, result)
    return result


def _evaluate(recipe: Recipe, run_dir: Path, family: Family, prompts: list[str], progress: Progress) -> dict[str, Any]:
    chosen = recipe.evaluate
    drawn = samples.draw(
        family.pipeline(),
        prompts,
        run_dir / SAMPLES,
        seeds_per_prompt=chosen.seeds_per_prompt,
        seed=chosen.seed,
        steps=chosen.steps,
        guidance=chosen.guidance,
        resolution=recipe.data.resolution,
        batch=chosen.batch,
        progress=progress,
    )
    figures.before_after(drawn.base, drawn.adapted, drawn.prompts, run_dir / GRID, title=recipe.name)
    scorer = parts.scorer(recipe)
    return {"samples": len(drawn.prompts)} | (samples.judge(drawn, scorer, seed=chosen.seed) if scorer else {})


def write_card(recipe: Recipe, run_dir: Path, result: dict[str, Any], repo: str | None) -> None:
    """From the result alone, so that a finished run can be pushed later."""
    data, beta = result["data"], parts.fixed_beta(recipe.method)
    settings = recipe.adapter.model_dump() | recipe.train.model_dump(exclude={"device", "save_every_steps"})
    card = report.model_card(
        result,
        base_model=recipe.base.model,
        data_source=recipe.data.path,
        data_report=SourceReport(rows=data["rows"], kept=data["kept"], dropped=Counter(data["dropped"])),
        method=recipe.method.model_dump(mode="json"),
        settings={name: value for name, value in settings.items() if name not in ("keep_checkpoints", "start")},
        sum_form_beta=sum_form_beta(beta, result["latent_shape"]) if beta is not None else None,
        resolution=recipe.data.resolution,
        sampling={"steps": recipe.evaluate.steps, "guidance": recipe.evaluate.guidance},
        repo=repo,
        grid=GRID if recipe.evaluate.prompts else None,
        curves=CURVES,
    )
    with atomic.clear_os_errors(run_dir):
        atomic.replace(run_dir / CARD, card.encode())


def implicit_accuracy(
    recipe: Recipe,
    family: Family,
    adapters: Adapters,
    pairs: cache.CachedPairs,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Of held-out pairs, of the first `limit` of them, on fixed draws."""
    return held_out(
        family,
        adapters,
        pairs,
        beta=parts.fixed_beta(recipe.method) or 1.0,
        batch=recipe.train.micro_batch_pairs or recipe.train.batch_pairs,
        seed=recipe.evaluate.seed,
        limit=limit,
        timestep_range=recipe.method.timestep_range,
        progress=progress,
    )
