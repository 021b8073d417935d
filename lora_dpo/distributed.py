"""Several processes that train one adapter: started by torchrun or `accelerate launch`, joined here.

Every process holds the whole adapter and takes a share of each optimizer step's pairs. Gradients are added up in one
flat float32 bucket per step, not by DistributedDataParallel: its hooks expect one forward pass per backward pass, and a
step has two (reference and policy), repeated by gradient checkpointing, in many parts. One process uses none of this.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_dpo.errors import LoraDpoError, UserError

T = TypeVar("T")
TIMEOUT = "LORA_DPO_TIMEOUT_SECONDS"
_DEFAULT_TIMEOUT_SECONDS = 1800.0
_PATIENCE = timedelta(days=30)  # while one process fills the cache or evaluates, the others wait


class StoppedElsewhere(LoraDpoError):
    """Another process failed, and says why itself."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Processes:
    """The processes of a run; by default this is the only one.

    All processes call the same methods in the same order. Each method raises a LoraDpoError if another process is gone
    or doesn't answer in time.

    Attributes:
        count, rank: how many there are, and which of them this is.
    """

    def __init__(self, count: int = 1, rank: int = 0) -> None:
        self.count, self.rank = count, rank
        self._patient: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if count > 1 else None

    @property
    def is_main(self) -> bool:
        """This process writes the files and shows the progress."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of a step's `total` pairs; the shares differ by one at most and leave nothing out.

        Raises:
            UserError: there are more processes than pairs.
        """
        if total < self.count:
            raise UserError(
                f"{total} can't be shared by {self.count} processes",
                where="train.batch_pairs",
                hint=f"start {total} processes at most, or raise train.batch_pairs",
            )
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def largest(self, number: int) -> int:
        """Of the numbers that they give."""
        return number if self.count == 1 else self._largest(number, None)

    def add_up(self, parameters: Sequence[nn.Parameter], sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients, in place, and the returned sums become their totals over the processes, the same bits on each.

        Args:
            sums: float32 scalars, of the same names everywhere.
        """
        if self.count == 1:
            return dict(sums)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(list(sums.values()))])
        with self._clear_errors():
            dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients] + [1] * len(sums))
        for gradient, total in zip(gradients, parts, strict=False):
            gradient.copy_(total.view_as(gradient))
        return {name: total[0] for name, total in zip(sums, parts[len(gradients) :], strict=True)}

    def together(self, function: Callable[[], T], *, patient: bool = False) -> T:
        """`function()` on every process, which fails on all if it fails on one.

        Args:
            patient: wait for the slowest without limit.

        Raises:
            StoppedElsewhere: it failed on another process, whose exit code this has.
        """
        if self.count == 1:
            return function()
        value, failure = None, None
        try:
            value = function()
        except Exception as error:
            failure = error
        if self._largest(failure is not None, self._patient if patient else None):
            told = self._gathered((str(failure), getattr(failure, "exit_code", 1)) if failure is not None else None)
            if failure is not None:
                raise failure
            rank, (text, code) = next((rank, told_by) for rank, told_by in enumerate(told) if told_by is not None)
            raise StoppedElsewhere(f"process {self.rank} stops, because process {rank} did: {text}", code)
        return value  # pyright: ignore[reportReturnType]

    def on_main(self, function: Callable[[], T]) -> T | None:
        """`function()` on the main process, while the others wait without limit; None on these."""
        return self.together(lambda: function() if self.is_main else None, patient=True)

    def from_main(self, function: Callable[[], T]) -> T:
        """`function()` on the main process, while the others wait without limit; all get its value, by pickle."""
        value = self.on_main(function)
        if self.count == 1:
            return value  # pyright: ignore[reportReturnType]
        held = [value]
        with self._clear_errors():
            dist.broadcast_object_list(held, src=0, group=self._patient)
        return value if self.is_main else held[0]  # pyright: ignore[reportReturnType]

    def require_same(self, values: Mapping[str, Any], what: str) -> None:
        """Raise a UserError on all that names the keys in which one of them has another value than the main one."""
        if self.count == 1:
            return
        told = self._gathered(dict(values))
        for rank, other in enumerate(told):
            differing = [key for key in told[0] | other if told[0].get(key) != other.get(key)]
            if differing:
                raise UserError(
                    f"{what}: process {rank} differs from process 0 in {', '.join(differing)}",
                    hint="all processes need the same recipe, data, base model, versions and kind of device",
                )

    def close(self) -> None:
        """Leave in good order, once all is done; a process that failed just ends."""
        if self.count > 1:
            with self._clear_errors():
                dist.barrier(group=self._patient)
            dist.destroy_process_group()

    def _largest(self, number: int, group: dist.ProcessGroup | None) -> int:
        numbers = torch.tensor([int(number)])
        with self._clear_errors():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return int(numbers.item())

    def _gathered(self, value: Any) -> list[Any]:
        told: list[Any] = [None] * self.count
        with self._clear_errors():
            dist.all_gather_object(told, value, group=self._patient)
        return told

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            what = (
                f"the other processes didn't answer for {timeout_seconds():g} s"
                if late
                else "the connection to the other processes is lost: one of them ended"
            )
            raise LoraDpoError(
                f"process {self.rank} stops: {what}\n  → see the first error in their output; the same command resumes "
                f"the run (${TIMEOUT} sets how long a step may take)"
            ) from error


def timeout_seconds() -> float:
    """How long an optimizer step waits for the slowest process.

    Raises:
        UserError: the environment variable isn't a positive number.
    """
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or _DEFAULT_TIMEOUT_SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < _PATIENCE.total_seconds():
        raise UserError(f"got {text!r}, expected a number of seconds", where=f"${TIMEOUT}")
    return seconds


def connect(device: torch.device) -> tuple[Processes, torch.device]:
    """Joins the processes that a launcher started, with gloo on CPUs and NCCL on GPUs; and this one's own device.

    Without a launcher, or if it started only one, nothing is initialised.

    Raises:
        UserError: no device for each process, or an environment that is not complete.
    """
    count = _environment("WORLD_SIZE", 1)
    if count <= 1:
        return Processes(), device
    rank, local_rank = _environment("RANK", -1), _environment("LOCAL_RANK", -1)
    if rank < 0 or local_rank < 0:
        raise UserError(
            f"WORLD_SIZE is {count}, but RANK and LOCAL_RANK aren't both set",
            where="the environment",
            hint="start with torchrun or `accelerate launch`, or set all of them",
        )
    on_gpus = device.type == "cuda"
    here = _environment("LOCAL_WORLD_SIZE", count)
    if on_gpus and (device.index is not None or here > torch.cuda.device_count()):
        have = "one GPU named for all" if device.index is not None else f"{torch.cuda.device_count()} GPUs here"
        raise UserError(
            f"{have}, and {here} processes on this machine",
            where="train.device",
            hint='one process per GPU, and device = "auto"; choose GPUs with CUDA_VISIBLE_DEVICES',
        )
    if not on_gpus:
        device = torch.device("cpu")
    import accelerate

    state = accelerate.PartialState(
        cpu=not on_gpus,
        backend="cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        timeout=timedelta(seconds=timeout_seconds()),
    )
    if (state.num_processes, state.process_index) != (count, rank):
        raise LoraDpoError(f"accelerate joined {state.num_processes} processes of {count}: {state!r}")
    if on_gpus:
        device = torch.device("cuda", torch.cuda.current_device())  # set by accelerate: this machine's local_rank-th
    return Processes(count, rank), device


def _environment(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"got {os.environ[name]!r}, expected a number", where=f"${name}") from None
