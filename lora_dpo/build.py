"""From a recipe to a finished run directory: one `match` per choice, then the steps in order."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_dpo import cache, checkpoint, completion, fitting, hub, inputs, optimizers, parts, peak_memory, stopping
from lora_dpo import recipe as recipes
from lora_dpo import run_dir as run_dirs
from lora_dpo.adapters import Adapters
from lora_dpo.distributed import Processes, connect
from lora_dpo.errors import UserError
from lora_dpo.families import Family
from lora_dpo.progress import NoProgress, Progress, make_progress
from lora_dpo.recipe import Recipe
from lora_dpo.run_dir import CARD, CURVES, GRID, RECIPE, RESULT
from lora_dpo.trackers import require as require_trackers
from lora_dpo.train import TrainResult, train
from lora_dpo.watch import Line


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        result: the content of `result.json`.
        already: it was finished before this call.
        pushed: the hub repository's address, if it was pushed.
        is_main: false on the processes beside the main one, which leave the summary to it.
    """

    run_dir: Path
    result: dict[str, Any]
    already: bool = False
    pushed: str | None = None
    is_main: bool = True


def run(
    recipe: Recipe,
    run_dir: Path,
    *,
    push_to_hub: str | None = None,
    quiet: bool = False,
    fresh: bool = False,
    resume: bool = True,
) -> Outcome:
    """Everything a recipe asks for, in `run_dir`; what is there already is not done again.

    Under torchrun or `accelerate launch` every process calls this; the main one writes all files.

    Args:
        fresh: a run that is there is renamed first, to `run_dir` + ".old-1" or the next free number.
        resume: go on with a run that is there; False: refuse to.

    Raises:
        UserError: input that can't be used, a run directory of another recipe, of other data or another base model, or
            of a living process, no disk space.
        LoraDpoError: training diverged, or the adapter that was written is not the one that was trained.
        Interrupted: Ctrl-C or SIGTERM; the run resumes.
    """
    processes, device = connect(parts.device(recipe.train.device))
    progress = make_progress(quiet=quiet) if processes.is_main else NoProgress()
    optimizers.require(recipe.train.optimizer, device)
    require_trackers(recipe.output.trackers)

    def differences(file: Path) -> run_dirs.Differences:
        found = run_dirs.Differences([], [])
        for key, (old, new) in recipes.differences(file, recipe).items():
            side = found.other if recipes.resumes(key, recipe) else found.learned
            side.append(f"{key}: {json.dumps(old)} → {json.dumps(new)}")
        return found

    def finished() -> dict[str, Any] | None:
        if push_to_hub is not None:
            hub.require_access(push_to_hub)
        if fresh and (aside := run_dirs.set_aside(run_dir)) is not None:
            progress.message(f"the run that was there is now in {aside}")
        if not resume and run_dirs.begun(run_dir):
            raise UserError(
                f"there is a run already, with step {checkpoint.newest_step(run_dir)} saved",
                where=run_dir,
                hint="give another --run-dir; --resume auto goes on with it, --fresh starts over",
            )
        return run_dirs.finished(run_dir, differences)

    # A finished run is only read; everything else is for one run at a time.
    held = processes.from_main(finished)
    if held is not None:
        outcome = Outcome(run_dir, held, already=True, is_main=processes.is_main)
    else:
        start = processes.together(partial(parts.start_origin, recipe))
        family = processes.together(partial(parts.family, recipe, device), patient=True)
        with ExitStack() as lock:

            def claim() -> dict[str, Any] | None:
                lock.enter_context(run_dirs.locked(run_dir))
                if (by_another := run_dirs.finished(run_dir, differences)) is None:
                    _require_same_run(recipe, run_dir, family, start)
                    run_dirs.claim(run_dir, recipes.dump(recipe))
                return by_another

            held = processes.from_main(claim)
            result = held or _stoppable(recipe, run_dir, family, device, progress, processes)
            outcome = Outcome(run_dir, result, already=held is not None, is_main=processes.is_main)
    if push_to_hub is not None:
        outcome = replace(outcome, pushed=processes.from_main(lambda: _push(recipe, run_dir, outcome, push_to_hub)))
    processes.close()
    return outcome


def _require_same_run(recipe: Recipe, run_dir: Path, family: Family, start: dict[str, str] | None) -> None:
    """Before anything is written, encoded or loaded: are these the data and the base model of the checkpoint?"""
    found = checkpoint.latest(run_dir, lambda _: None)
    if found is not None:
        checkpoint.require_steps(found, recipe.train.steps)
        known = parts.identity(recipe, family, start)
        checkpoint.require_identity(found, known | {"pairs": found.identity.get("pairs")})


def _stoppable(
    recipe: Recipe, run_dir: Path, family: Family, device: torch.device, progress: Progress, processes: Processes
) -> dict[str, Any]:
    """`_execute`, with words for Ctrl-C and SIGTERM wherever they come; training itself finishes its step first."""
    try:
        with stopping.stoppable() as signal_received:
            try:
                with ExitStack() as stack:
                    started = partial(stack.enter_context, parts.trackers(recipe, run_dir, progress.message))
                    trackers = processes.on_main(started)
                    track = trackers.log if trackers is not None else lambda _: None
                    return _execute(recipe, run_dir, family, device, progress, processes, track)
            except KeyboardInterrupt as error:
                step = checkpoint.newest_step(run_dir)
                saved = f"step {step} of {recipe.train.steps} is saved in {run_dir}" if step else "no step is saved yet"
                raise stopping.Interrupted(
                    f"interrupted; {saved}\n  → run the same command again to resume",
                    signal_received() or signal.SIGINT,
                ) from error
    finally:
        progress.stop()


def _push(recipe: Recipe, run_dir: Path, outcome: Outcome, repo: str) -> str:
    completion.write_card(recipe, run_dir, outcome.result, repo=repo)
    return hub.push(run_dir, repo, _pushed(outcome.result))


def _pushed(result: dict[str, Any]) -> list[str]:
    """Files below the run directory that a repository on the hub gets."""
    files = [result["adapter"], result.get("adapter_kohya"), CARD, GRID, CURVES, RECIPE, RESULT]
    return [file for file in files if file is not None]


def _execute(
    recipe: Recipe,
    run_dir: Path,
    family: Family,
    device: torch.device,
    progress: Progress,
    processes: Processes,
    track: Callable[[Line], None],
) -> dict[str, Any]:
    began = time.monotonic()
    peak_memory.restart(device)
    begun = parts.start(recipe)
    start = begun.origin() if begun is not None else None
    directory = parts.cache_dir(recipe)
    # They divide the work where they share the directory.
    pairs = processes.together(partial(inputs.pairs, recipe, family, directory, progress), patient=True)
    cut = inputs.tell(pairs, family, progress)
    kept_out = processes.on_main(lambda: inputs.held_out_pairs(recipe, family, directory, progress))
    prompts = processes.on_main(lambda: inputs.prompts(recipe, kept_out)) or []

    if recipe.train.gradient_checkpointing == "auto":
        choose = partial(fitting.automatic, recipe, run_dir, device, progress.message)
        recipe = fitting.settled(recipe, processes.from_main(choose))
    adapters = parts.adapters(recipe, family, begun, progress.message)
    del begun  # twice as large as the adapter
    encoding = peak_memory.gib(device)
    trained = _train(recipe, run_dir, family, adapters, start, pairs, kept_out, device, progress, processes, track)
    return processes.from_main(
        lambda: completion.complete(
            recipe,
            run_dir,
            family,
            adapters,
            start,
            pairs,
            cut,
            kept_out,
            prompts,
            trained,
            device,
            progress,
            began,
            encoding,
        )
    )


def _train(
    recipe: Recipe,
    run_dir: Path,
    family: Family,
    adapters: Adapters,
    start: dict[str, str] | None,
    pairs: cache.CachedPairs,
    kept_out: cache.CachedPairs | None,
    device: torch.device,
    progress: Progress,
    processes: Processes,
    track: Callable[[Line], None],
) -> TrainResult:
    chosen = recipe.train

    def measure() -> dict[str, float]:
        assert kept_out is not None  # the recipe's checks
        found = completion.implicit_accuracy(
            recipe, family, adapters, kept_out, limit=recipe.evaluate.every_steps_pairs
        ).to_json()
        return {name: found[name] for name in _MEASURED}

    def learning_rate(step: int) -> float:
        return optimizers.learning_rate_at(
            step,
            schedule=chosen.schedule,
            learning_rate=chosen.learning_rate,
            steps=chosen.steps,
            warmup_steps=chosen.warmup_steps,
        )

    return train(
        method=parts.method(recipe, pairs, family, adapters),
        adapters=adapters,
        optimizer=parts.optimizer(recipe, adapters),
        learning_rate=learning_rate,
        steps=chosen.steps,
        run_dir=run_dir,
        identity=parts.identity(recipe, family, start) | {"pairs": pairs.fingerprint},
        reporter=progress,
        device=device,
        micro_batch_pairs=chosen.micro_batch_pairs,
        max_grad_norm=chosen.max_grad_norm,
        save_every_steps=chosen.save_every_steps,
        keep_checkpoints=chosen.keep_checkpoints,
        precision=chosen.precision,
        ema_decay=chosen.ema_decay,
        spike_factor=chosen.spike_factor or None,
        held_out=measure if recipe.evaluate.every_steps is not None else None,
        held_out_every_steps=recipe.evaluate.every_steps,
        export=recipe.evaluate.checkpoint,
        track=track,
        processes=processes,
    )


_MEASURED = ("accuracy", "margin", "loss", "error_winner", "error_loser", "ref_error_winner", "ref_error_loser")
