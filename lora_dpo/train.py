"""The one training loop: optimizer steps, metrics, checkpoints, exact resume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_dpo import checkpoint, optimizers, peak_memory
from lora_dpo.adapters import Adapters
from lora_dpo.distributed import Processes
from lora_dpo.ema import Ema
from lora_dpo.errors import LoraDpoError
from lora_dpo.methods import Method, StepBatch
from lora_dpo.metrics_file import HELD_OUT, MetricsFile
from lora_dpo.progress import Progress
from lora_dpo.step import OTHER_SETTINGS, Precision, Step
from lora_dpo.stopping import ECHO_SECONDS, Interrupted, stop_requests
from lora_dpo.watch import SPIKE_STEPS, Line, Watch

METRICS, NOT_FINITE = "metrics.jsonl", "not_finite.json"


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        steps: optimizer steps that the adapters now have behind them.
        resumed_from: the step it began at; 0 for a new run, `steps` for one that was finished already.
        seconds: spent in this call.
        peak_memory_gib: since training began; of the GPU's memory there, of the process's on a CPU.
        metrics: the last step's line of `metrics.jsonl`; empty if no step was made.
        exported_step: the step whose weights the adapters have.
        rollbacks: how many spikes it went back from.
    """

    steps: int
    resumed_from: int
    seconds: float
    peak_memory_gib: float
    metrics: dict[str, float] = field(default_factory=dict)
    exported_step: int = 0
    rollbacks: int = 0


def train(
    *,
    method: Method,
    adapters: Adapters,
    optimizer: torch.optim.Optimizer,
    learning_rate: Callable[[int], float],
    steps: int,
    run_dir: Path | str,
    identity: Mapping[str, Any],
    reporter: Progress,
    device: torch.device,
    micro_batch_pairs: int | None = None,
    max_grad_norm: float = 1.0,
    save_every_steps: int = 100,
    keep_checkpoints: int | None = 2,
    precision: Precision = "float32",
    ema_decay: float | None = None,
    spike_factor: float | None = None,
    held_out: Callable[[], Mapping[str, float]] | None = None,
    held_out_every_steps: int | None = None,
    export: Literal["last", "best"] = "last",
    track: Callable[[Line], None] = lambda _: None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train the adapters to `steps` optimizer steps, from the newest intact checkpoint in `run_dir` if there is one.

    An uninterrupted run and one that was killed anywhere and resumed end with the same weights, bit for bit, on the
    same machine, and with the same `metrics.jsonl` but for its times. At the end the adapters have the weights that
    are to be used, which for an average or a schedule-free optimizer are not those that it trains on.

    After a spike (see `watch.Watch`) training goes back to the newest checkpoint before it, passes over the pairs that
    led there, and goes on at half the learning rate; the third spike ends the run.

    Args:
        optimizer: over `adapters.parameters()`, freshly built.
        learning_rate: of a 0-based step.
        identity: JSON values a resumed run must share with the one that wrote the checkpoint.
        micro_batch_pairs: pairs per pass; None: the whole step's at once. The gradient is the same up to rounding.
        max_grad_norm: the gradient is scaled down to this norm; 0: it is left alone.
        keep_checkpoints: the last so many, the best one, and as many as it takes to go back from a spike; None: all.
            Others go with the next one.
        precision: of the passes; "bfloat16" is torch's autocast. Losses and adapter weights are float32 always.
        ema_decay: keep an average of the weights, and use it in the end; None: don't.
        spike_factor: see `watch.Watch`.
        held_out: numbers on held-out pairs, for the weights as they are now; it must leave them and every random
            state as they were. `accuracy` and `margin` among them choose the best checkpoint.
        held_out_every_steps: when it is called, and after the last step.
        export: the weights that the adapters have at the end: the last, or those of the best checkpoint.
        track: gets every line of `metrics.jsonl` too; after a resume or a rollback steps come again.
        processes: that share the pairs of each step; all call this with the same arguments and get the same weights.
            The main one reads and writes the files, and calls `held_out`.

    Raises:
        UserError: the checkpoint is of another run or beyond `steps`; the disk is full or can't be written; the
            processes don't have the same data, or are more than a step's pairs.
        LoraDpoError: a loss or gradient isn't finite, or spikes don't end; earlier checkpoints are kept.
        Interrupted: on Ctrl-C or SIGTERM, after the current step was finished and saved.
    """
    run_dir, began = Path(run_dir), time.monotonic()
    peak_memory.restart(device)
    processes = processes or Processes()
    processes.require_same(identity, "the processes don't train the same")
    ema = Ema(adapters.parameters(), ema_decay) if ema_decay is not None else None
    done = 0
    rollbacks: list[tuple[int, int]] = []  # from which step, to which

    def restore(found: checkpoint.Checkpoint) -> None:
        adapters.load_state_dict(processes.from_main(found.adapter))
        optimizer.load_state_dict(processes.from_main(found.optimizer))
        if ema is not None and (mean := processes.from_main(found.averaged)) is not None:
            ema.load_state_dict(mean)

    def batches() -> Iterator[StepBatch]:
        return method.batches(done + sum(bad - good for bad, good in rollbacks))

    processes.on_main(lambda: checkpoint.tidy(run_dir))
    found = processes.from_main(lambda: checkpoint.latest(run_dir, reporter.message))
    if found is not None:
        checkpoint.require_identity(found, identity)
        checkpoint.require_steps(found, steps)
        restore(found)
        done, rollbacks = found.step, found.rollbacks
        reporter.message(f"resumed at step {done} of {steps} from {found.path}")
        if others := checkpoint.other_versions(found):
            reporter.message(f"written by other versions ({', '.join(others)}): from here on equal to rounding only")
    resumed_from = done

    def averaged() -> dict[str, Tensor] | None:
        if ema is None and not optimizers.is_schedule_free(optimizer):
            return None
        with _in_use(optimizer, ema):
            return adapters.state_dict()

    def look_back() -> tuple[Watch, int | None]:
        lines, kept = processes.from_main(lambda: (metrics.lines(), checkpoint.steps(run_dir)))
        method.restart(lines)
        return Watch(spike_factor, lines), best_step(lines, kept)

    def save() -> None:
        metrics.flush()
        checkpoint.save(
            run_dir,
            done,
            adapter=adapters.state_dict(),
            optimizer=optimizer.state_dict(),
            averaged=averaged(),
            rollbacks=rollbacks,
            identity=identity,
            keep=keep_checkpoints,
            every=save_every_steps,
            besides=best,
            back=None if spike_factor is None else _back_from(done + 1, rollbacks),
        )

    step = Step(
        method,
        adapters,
        optimizer,
        device,
        run_dir / (NOT_FINITE if processes.is_main else f"{processes.rank}-{NOT_FINITE}"),
        micro_batch_pairs,
        max_grad_norm,
        precision,
        ema,
        processes,
    )
    line: dict[str, float] = {}
    shown: dict[str, float] = {}
    with (
        MetricsFile(run_dir / METRICS if processes.is_main else Path(os.devnull), done) as metrics,
        stop_requests(echo_seconds=0.0 if processes.count == 1 else ECHO_SECONDS) as stop_requested,
        _job(reporter, done, steps),
    ):
        watch, best = look_back()
        coming = batches()
        while done < steps:
            batch = replace(next(coming), step=done)
            line = step(batch, learning_rate(done) * 0.5 ** len(rollbacks))
            done += 1
            watch.see(line)
            if (problem := watch.spike()) is not None:
                good = processes.from_main(partial(_before_spike, run_dir, done, problem, rollbacks, save_every_steps))
                reporter.message(
                    f"step {done}: {problem}; back to step {good.step}, past these pairs, at half the rate"
                )
                # Nothing is saved here: a run that is killed now makes the same steps, and finds the same spike.
                restore(good)
                rollbacks = [*rollbacks, (done, good.step)]
                reporter.advance(good.step - (done - 1))
                done = good.step
                if processes.is_main:
                    checkpoint.remove_after(run_dir, done)
                metrics.cut(done)
                watch, best = look_back()
                coming = batches()
                continue
            if held_out is not None and held_out_every_steps and (done % held_out_every_steps == 0 or done == steps):
                with _in_use(optimizer, ema):
                    measured = processes.from_main(lambda: dict(held_out()))
                line |= {f"{HELD_OUT}{name}": value for name, value in measured.items()}
            method.see(line)
            metrics.write(line)
            track(line)
            shown |= {name: line[name] for name in _SHOWN if name in line}
            reporter.advance(1, **shown)
            if (drift := watch.drift()) is not None:
                reporter.message(drift)
            improved = False
            if f"{HELD_OUT}accuracy" in line:
                measurements = processes.from_main(metrics.lines)
                improved = best_step(measurements, [best, done]) == done
                best = done if improved else best
                reporter.message(_on_held_out(line, measurements, best))
            stop = processes.largest(stop_requested())
            if improved or done == steps or done % save_every_steps == 0 or stop:
                processes.on_main(save)
            if stop:
                raise Interrupted(
                    f"interrupted; step {done} of {steps} is saved in {run_dir}\n"
                    "  → run the same command again to resume",
                    stop,
                )
    exported = done
    if export == "best" and best is not None and best != done:
        restore(processes.from_main(partial(checkpoint.at, run_dir, best)))
        reporter.message(f"the adapter is that of step {best}, the best on held-out pairs")
        exported = best
    optimizers.use_evaluation_weights(optimizer)
    if ema is not None:
        ema.put_in()
    seconds, memory = time.monotonic() - began, peak_memory.gib(device)
    return TrainResult(steps, resumed_from, seconds, memory, line, exported, len(rollbacks))


def best_step(lines: list[dict[str, Any]], among: Sequence[int | None]) -> int | None:
    """The first of these steps with the highest held-out accuracy, and among equals the highest margin, if any has."""
    known = [line for line in lines if f"{HELD_OUT}accuracy" in line and line["step"] in among]
    if not known:
        return None
    return max(known, key=lambda line: (line[f"{HELD_OUT}accuracy"], line[f"{HELD_OUT}margin"], -line["step"]))["step"]


@contextmanager
def _job(reporter: Progress, done: int, steps: int) -> Iterator[None]:
    if steps > done:
        reporter.start(steps, "train", done)
    try:
        yield
    finally:
        reporter.stop()


@contextmanager
def _in_use(optimizer: torch.optim.Optimizer, ema: Ema | None) -> Iterator[None]:
    """Scope in which the adapters have the weights that would be exported now."""
    with optimizers.evaluation_weights(optimizer), ema.used() if ema is not None else nullcontext():
        yield


def _before_spike(
    run_dir: Path, done: int, problem: str, rollbacks: list[tuple[int, int]], every: int
) -> checkpoint.Checkpoint:
    """The newest checkpoint that the spike's steps are not behind, or the one that was gone back to last.

    Of the regular ones: where a run was interrupted, and so saved, must not decide where it goes back to.
    """
    good = checkpoint.latest(run_dir, lambda _: None, at_most=_back_from(done, rollbacks), every=every)
    if good is not None and len(rollbacks) < MAX_ROLLBACKS:
        return good
    ended = "there is no checkpoint before it" if good is None else f"{MAX_ROLLBACKS} returns didn't help"
    raise LoraDpoError(
        f"step {done}: {problem}, and {ended}: training diverges; earlier checkpoints are kept\n"
        f"  → lower train.learning_rate, or raise method.beta; train.spike_factor is what was watched. {OTHER_SETTINGS}"
    )


def _back_from(step: int, rollbacks: list[tuple[int, int]]) -> int:
    """The last step to which a spike seen at `step` may lead back: before its steps, and not before the last return."""
    return max([step - SPIKE_STEPS, *(good for _, good in rollbacks[-1:])])


MAX_ROLLBACKS = 2
_SHOWN = ("loss", "margin", "implicit_accuracy", f"{HELD_OUT}accuracy", "learning_rate", "peak_memory_gib")


def _on_held_out(line: Line, lines: Sequence[Line], best: int | None) -> str:
    """What was measured now, and where the best was: is it learning?"""
    accuracy = f"{HELD_OUT}accuracy"
    text = f"step {line['step']}: held-out accuracy {line[accuracy]:.3f}, margin {line[f'{HELD_OUT}margin']:+.4f}"
    if best is None or best == line["step"]:
        return text + (" (the best so far)" if sum(accuracy in one for one in lines) > 1 else "")
    return text + "".join(f" (the best: {one[accuracy]:.3f} at step {best})" for one in lines if one["step"] == best)
