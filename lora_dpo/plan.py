"""`lora-dpo plan`: what a run will do and what it will take, before it is started."""

from __future__ import annotations

import re
from typing import Any

import torch

from lora_dpo import fitting, memory, plan_data
from lora_dpo.errors import UserError
from lora_dpo.fake_device import Kind
from lora_dpo.fitting import Fitting
from lora_dpo.ledger import PARTS, Peak
from lora_dpo.memory import GIB, Estimate
from lora_dpo.plan_data import PlannedData
from lora_dpo.progress import make_progress
from lora_dpo.recipe import Recipe


def run(recipe: Recipe, has_data: bool = True, *, gpu: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """The plan, for JSON.

    Args:
        has_data: whether the recipe's data are there to be read.
        gpu: a card's memory, such as "24GB"; None: this machine's card, if there is one.

    Raises:
        UserError: data, a base or targets that can't be used, or a size that can't be read.
    """
    room = gpu_bytes(gpu) if gpu is not None else _own_gpu(recipe)
    kind: Kind = "cpu" if recipe.train.device == "cpu" and gpu is None else "cuda"
    progress = make_progress(quiet=quiet)
    found = plan_data.look(recipe, progress) if has_data else None
    progress.message("tracing the memory of a step")
    given, recipe = recipe, _settled(recipe, room, kind)
    estimated = memory.estimate(recipe, kind)
    document = _document(recipe, found, estimated, room)
    if room is not None and estimated.needed() > room:
        progress.message("it doesn't fit: looking for the nearest setting that does")
        found_too = fitting.nearest(recipe, room, estimated, lambda tried: progress.message(f"  {tried}"))
        document["nearest"] = _nearest(found_too, given, room)
    return document


def _settled(recipe: Recipe, room: int | None, kind: Kind) -> Recipe:
    """With what `gradient_checkpointing = "auto"` comes to, "full" where nothing fits."""
    if recipe.train.gradient_checkpointing != "auto":
        return recipe
    budget = room if recipe.train.memory_budget_gb is None else int(recipe.train.memory_budget_gb * GIB)
    if budget is None:
        raise UserError(
            'gradient_checkpointing = "auto" depends on a memory',
            where="train.memory_budget_gb",
            hint="give it, or a card as --gpu 24GB",
        )
    found = fitting.fewest_recomputed(recipe, budget, kind)
    return fitting.settled(recipe, "full" if found is None else found[0])


def gpu_bytes(text: str) -> int:
    """Makers' GB of cards are GiB; a bare number is one too.

    Raises:
        UserError: no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(G|M)i?B?)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"can't read {text!r} as a card's memory", where="--gpu", hint="for example --gpu 24GB")
    return int(float(found[1]) * (GIB if (found[2] or "G").upper() == "G" else GIB // 1024))


def _own_gpu(recipe: Recipe) -> int | None:
    if recipe.train.device == "cpu" or not torch.cuda.is_available():
        return None
    name = recipe.train.device if recipe.train.device.startswith("cuda") else "cuda"
    return torch.cuda.get_device_properties(torch.device(name)).total_memory


def _document(recipe: Recipe, found: PlannedData | None, estimated: Estimate, room: int | None) -> dict[str, Any]:
    peak = estimated.peak
    needed = estimated.needed()
    batch = recipe.train.batch_pairs
    size = recipe.train.micro_batch_pairs or batch
    pairs = None if found is None else found.pairs(recipe.data.limit)
    return {
        "name": recipe.name,
        "device": estimated.device,
        "steps": recipe.train.steps,
        "batch_pairs": batch,
        "passes_per_step": -(-batch // size),
        "pairs_per_pass": size,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "pairs": pairs,
        "epochs": None if pairs is None else round(recipe.train.steps * batch / pairs, 4),
        "data": None if found is None else found.to_json(recipe.data.path),
        "buckets": None if found is None else found.buckets(recipe.data.limit),
        "cache": None if found is None else found.cache(recipe, estimated.picture_bytes, estimated.prompt_bytes),
        "peak_gib": _gib(peak.total),
        "peak_phase": estimated.highest(),
        "parts_gib": _parts(peak),
        "phases": {
            name: {"peak_gib": _gib(phase.total), "parts_gib": _parts(phase)}
            for name, phase in estimated.phases.items()
        },
        "training_peak_gib": _gib(estimated.phases[estimated.highest(memory.TRAINING)].total),
        "allowance_gib": _gib(estimated.allowance(peak)),
        "needed_gib": _gib(needed),
        "gpu_gib": None if room is None else _gib(room),
        "fits": None if room is None else needed <= room,
        "nearest": None,
        "notes": estimated.notes,
    }


def _nearest(found: Fitting, given: Recipe, room: int) -> dict[str, Any]:
    overrides = dict(found.overrides)
    if given.train.gradient_checkpointing == "auto":  # which comes to the same by itself
        overrides.pop("train.gradient_checkpointing", None)
        if given.train.memory_budget_gb is not None:
            overrides["train.memory_budget_gb"] = room / GIB
    return {
        "overrides": [f"{key}={value}" for key, value in overrides.items()],
        "needed_gib": _gib(found.needed),
        "fits": found.too_large is None,
        "too_large": found.too_large,
    }


def _parts(peak: Peak) -> dict[str, float]:
    return {name: _gib(peak.parts.get(name, 0)) for name in PARTS}


def _gib(count: int) -> float:
    return round(count / GIB, 3)
