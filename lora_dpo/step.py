"""One optimizer step: backward of the batch's parts, clipping, the optimizer, and the step's line of numbers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, final

import torch
from torch import Tensor

from lora_dpo import atomic, peak_memory
from lora_dpo.adapters import Adapters
from lora_dpo.distributed import Processes
from lora_dpo.ema import Ema
from lora_dpo.errors import LoraDpoError
from lora_dpo.methods import Method, StepBatch

Precision = Literal["float32", "bfloat16"]
OTHER_SETTINGS = (
    "With other settings it is another run: --fresh starts over, and adapter.start begins with a checkpoint that "
    "lora-dpo export --step has written"
)


@final
@dataclass(frozen=True)
class Step:
    """What the steps of a run have in common; a call makes one. Arguments as for `train.train`.

    Attributes:
        not_finite: the file for the pairs whose loss or gradient is not finite.
    """

    method: Method
    adapters: Adapters
    optimizer: torch.optim.Optimizer
    device: torch.device
    not_finite: Path
    micro_batch_pairs: int | None = None
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    ema: Ema | None = None
    processes: Processes | None = None

    def __call__(self, batch: StepBatch, rate: float) -> dict[str, float]:
        """One optimizer step at this learning rate; every process has the whole batch, and computes its share.

        Returns:
            the line of `metrics.jsonl`; "seconds" are those of the step without this line's own numbers.

        Raises:
            LoraDpoError: a loss or the gradient isn't finite.
        """
        processes = self.processes or Processes()
        parameters = list(self.adapters.parameters().values())
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.adapters.train()
        own = batch.only(processes.share(len(batch)))
        backward = partial(
            accumulate, self.method, own, self.micro_batch_pairs, self.device, self.precision, self.not_finite
        )
        sums = processes.add_up(parameters, processes.together(backward))
        self.adapters.train(False)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf).item()
        if not math.isfinite(grad_norm):
            processes.on_main(partial(_stop_at, "gradient", batch, range(len(batch)), self.not_finite))
        self.optimizer.step()
        done = batch.step + 1
        if self.ema is not None:
            self.ema.update(done)
        seconds = time.perf_counter() - started
        line = {"step": done} | {name: float(total) / len(batch) for name, total in sums.items()}
        return line | {
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "adapter_norm": self.adapters.norm(),
            "pairs_per_second": len(batch) / seconds,
            "seconds": seconds,
            "peak_memory_gib": peak_memory.gib(self.device),
        }


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A new scope for every pass: its cache of cast weights must not outlive them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def accumulate(
    method: Method,
    batch: StepBatch,
    micro_batch_pairs: int | None,
    device: torch.device,
    precision: Precision,
    file: Path,
) -> dict[str, Tensor]:
    """Backward of every part; returns the logged sums over the step's pairs."""
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    for part in batch.parts(micro_batch_pairs):
        parts = method.backward(part, partial(autocast, device, precision))
        losses.append(parts.per_pair)
        for name, value in parts.sums.items():
            sums[name] = sums[name] + value if name in sums else value
    finite = torch.isfinite(torch.cat(losses)).tolist()  # the step's first wait for a GPU
    if not all(finite):
        _stop_at("loss", batch, [n for n, fine in enumerate(finite) if not fine], file)
    return sums


def _stop_at(what: str, batch: StepBatch, places: Sequence[int], file: Path) -> NoReturn:
    """Raises, once the pairs at these places of the batch and their draws are written to `file`."""
    described = batch.describe()
    document = {"what": what, "step": batch.step + 1, "pairs": [described[place] for place in places]}
    more = f"{file} has their prompts and draws"
    try:
        atomic.replace(file, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        more = f"their prompts and draws could not be written to {file}: {error.strerror or error}"
    keys = [batch.keys[place] for place in places]
    named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise LoraDpoError(
        f"the {what} of step {batch.step + 1} isn't finite (pairs {named}; {more}); earlier checkpoints are kept\n"
        "  → lower learning_rate or beta, or look at these pairs; in bfloat16, try precision float32. "
        f"{OTHER_SETTINGS}"
    )
