"""The one training loop: optimizer steps, metrics, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from lora_dpo import atomic, checkpoint, optimizers
from lora_dpo.adapters import Adapters
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.methods import Method, StepBatch
from lora_dpo.progress import Progress

METRICS = "metrics.jsonl"
Precision = Literal["float32", "bfloat16"]


class Interrupted(LoraDpoError):
    """Ctrl-C or SIGTERM: the run is saved and resumes."""

    exit_code = 130


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        steps: optimizer steps that the adapters now have behind them.
        resumed_from: the step it began at; 0 for a new run, `steps` for one that was finished already.
        seconds: spent in this call.
        peak_memory_gib: of the GPU's memory there, of the process's on a CPU.
        metrics: the last step's line of `metrics.jsonl`; empty if no step was made.
    """

    steps: int
    resumed_from: int
    seconds: float
    peak_memory_gib: float
    metrics: dict[str, float] = field(default_factory=dict)


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
) -> TrainResult:
    """Train the adapters to `steps` optimizer steps, from the newest intact checkpoint in `run_dir` if there is one.

    An uninterrupted run and one that was killed anywhere and resumed end with the same weights, bit for bit, on the
    same machine, and with the same `metrics.jsonl` but for its times. At the end the adapters have the weights that are
    to be used, which for a schedule-free optimizer are not those that it trains on and saves.

    Args:
        optimizer: over `adapters.parameters()`, freshly built.
        learning_rate: of a 0-based step.
        identity: JSON values a resumed run must share with the one that wrote the checkpoint.
        micro_batch_pairs: pairs per pass; None: the whole step's at once. The gradient is the same up to rounding.
        max_grad_norm: the gradient is scaled down to this norm; 0: it is left alone.
        keep_checkpoints: the last so many; None: all.
        precision: of the passes; "bfloat16" is torch's autocast. Losses and adapter weights are float32 always.

    Raises:
        UserError: the checkpoint is of another run or beyond `steps`; the disk is full or can't be written.
        LoraDpoError: a loss or gradient isn't finite; earlier checkpoints are kept.
        Interrupted: on Ctrl-C or SIGTERM, after the current step was finished and saved.
    """
    run_dir, began = Path(run_dir), time.monotonic()
    found = checkpoint.latest(run_dir, reporter.message)
    done = 0
    if found is not None:
        checkpoint.require_identity(found, identity)
        if found.step > steps:
            raise UserError(
                f"it has {found.step} steps already, {steps} are asked for",
                where=found.path,
                hint=f"ask for at least {found.step} steps, or give another --run-dir",
            )
        adapters.load_state_dict(found.adapter())
        optimizer.load_state_dict(found.optimizer())
        done = found.step
        reporter.message(f"resumed at step {done} of {steps} from {found.path}")
    result = TrainResult(steps, done, 0.0, peak_memory_gib(device))
    if done == steps:
        optimizers.use_evaluation_weights(optimizer)
        return result

    def save() -> None:
        metrics.flush()
        checkpoint.save(
            run_dir,
            done,
            adapter=adapters.state_dict(),
            optimizer=optimizer.state_dict(),
            identity=identity,
            keep=keep_checkpoints,
        )

    parameters = list(adapters.parameters().values())
    line: dict[str, float] = {}
    reporter.start(steps - done, "train")
    adapters.train()
    try:
        with _MetricsFile(run_dir / METRICS, done) as metrics, _stop_requests() as stop_requested:
            for batch in method.batches(done):
                started = time.perf_counter()
                rate = learning_rate(batch.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                sums = _accumulate(method, batch, micro_batch_pairs, device, precision)
                grad_norm = _clipped(parameters, max_grad_norm, batch)
                optimizer.step()
                done += 1
                seconds = time.perf_counter() - started
                line = {name: float(total) / len(batch) for name, total in sums.items()} | {
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "adapter_norm": adapters.norm(),
                    "pairs_per_second": len(batch) / seconds,
                    "seconds": seconds,
                    "peak_memory_gib": peak_memory_gib(device),
                }
                metrics.write({"step": done} | line)
                reporter.advance(1, **{name: line[name] for name in _SHOWN if name in line})
                if done == steps or done % save_every_steps == 0 or stop_requested():
                    save()
                    if stop_requested():
                        raise Interrupted(
                            f"interrupted; step {done} of {steps} is saved in {run_dir}\n"
                            "  → run the same command again to resume"
                        )
                if done == steps:
                    break
        optimizers.use_evaluation_weights(optimizer)
    finally:
        adapters.train(False)
        reporter.stop()
    return TrainResult(steps, result.resumed_from, time.monotonic() - began, peak_memory_gib(device), line)


_SHOWN = ("loss", "margin", "implicit_accuracy", "learning_rate", "peak_memory_gib")


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: the GPU's allocated, or the process's resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _accumulate(
    method: Method, batch: StepBatch, micro_batch_pairs: int | None, device: torch.device, precision: Precision
) -> dict[str, Tensor]:
    """Backward of every part; returns the logged sums over the step's pairs."""
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    for part in batch.parts(micro_batch_pairs):
        # One autocast scope per part: its cache of cast weights must not outlive them.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            parts = method.loss(part)
        parts.loss.backward()
        losses.append(parts.per_pair)
        for name, value in parts.sums.items():
            sums[name] = sums[name] + value if name in sums else value
    finite = torch.isfinite(torch.cat(losses)).tolist()  # the step's first wait for a GPU
    if not all(finite):
        raise LoraDpoError(
            _not_finite("loss", batch, [k for k, fine in zip(batch.keys, finite, strict=True) if not fine])
        )
    return sums


def _clipped(parameters: list[torch.nn.Parameter], max_grad_norm: float, batch: StepBatch) -> float:
    """The gradient's norm before clipping."""
    limit = max_grad_norm if max_grad_norm > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    if not math.isfinite(norm):
        raise LoraDpoError(_not_finite("gradient", batch, batch.keys))
    return norm


def _not_finite(what: str, batch: StepBatch, keys: list[str]) -> str:
    named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    return (
        f"the {what} of step {batch.step + 1} isn't finite (pairs {named}); earlier checkpoints are kept\n"
        "  → lower learning_rate or beta, or look at these pairs; in bfloat16, try precision float32"
    )


class _MetricsFile:
    """`metrics.jsonl` in append mode, cut on opening to the lines up to `step`."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step
        self._file: TextIO | None = None

    def __enter__(self) -> _MetricsFile:
        with atomic.clear_os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                old = self._path.read_bytes()
                kept = b"".join(_lines_up_to(old, self._step))
                if kept != old:
                    atomic.replace(self._path, kept)
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, line: Mapping[str, float | int]) -> None:
        with atomic.clear_os_errors(self._path):
            print(json.dumps(line), file=self._file, flush=True)

    def flush(self) -> None:
        """On the disk before the checkpoint is: a resumed run finds every line up to its step."""
        if self._file is not None:
            with atomic.clear_os_errors(self._path):
                atomic.sync(self._file)


def _lines_up_to(data: bytes, step: int) -> Iterator[bytes]:
    for line in data.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError):
            continue  # torn by the kill


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask once; after that the previous handlers are back, so a second one leaves at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # signals go to the main thread; its owner decides there
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step; once more to stop at once, unsaved\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
