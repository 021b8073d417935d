"""Scores of a tiny-world model on the held-out prompts, averaged over pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import preferences, scenes, taste
from .verifier import CATEGORIES, Measurement, measure


def score_base(
    base: Path,
    lora: Path | None = None,
    *,
    prompts: int = 200,
    seeds: int = 1,
    steps: int = preferences.STEPS,
    guidance: float = preferences.GUIDANCE,
) -> dict[str, float | int]:
    """Means of every score over `prompts` held-out captions × `seeds` pictures; see `verifier` for what each means."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from ..sampling import sample

    plan = preferences.Plan()
    captions = preferences.prompts(plan)[plan.train_prompts :][:prompts]
    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    many = [c for c in captions for _ in range(seeds)]
    numbers = [s for _ in captions for s in range(seeds)]
    side = scenes.SIZE
    images = sample(pipe, many, numbers, steps=steps, guidance=guidance, height=side, width=side, batch=64)
    return summary(measure(images, many), many)


def summary(measured: list[Measurement], captions: list[str]) -> dict[str, float | int]:
    """Means over pictures; a category counts only where the caption asserts it."""
    kinds = [scenes.read(c).kind for c in captions]
    means: dict[str, float | int] = {"pictures": len(measured)}

    def mean(name: str, values: list[float]) -> None:
        known = [v for v in values if not np.isnan(v)]
        if known:
            means[name] = float(np.mean(known))

    for name in ("strict", "mean", "style_shading", "size", "vividness", "crispness"):
        mean(name, [float(getattr(m, name)) for m in measured])
    for category in CATEGORIES:
        facts = [m.facts[category] for m in measured]
        mean(category + " (said)", [float(fact) for fact in facts if fact is not None])
    for kind in scenes.KINDS:
        mean(f"strict, {kind}", [float(m.strict) for m, k in zip(measured, kinds, strict=True) if k == kind])
    for style in scenes.STYLES:
        mean(style, [float(m.style == style) for m in measured])
    mean("alignment", [taste.alignment(m) for m in measured])
    mean("aesthetic", [taste.aesthetic(m) for m in measured])
    mean("utility", [taste.utility(m) for m in measured])
    return means
