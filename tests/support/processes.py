"""Several processes on this machine, as a launcher starts them; and what they do in the tests, on the toy.

`python -m tests.support.processes DIRECTORY SCENARIO…` is one of them. Each scenario leaves `SCENARIO-RANK.pt` there.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lora_dpo.distributed import Processes, connect
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.methods import LossParts, Method
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.methods.stream import PairStream
from lora_dpo.step import accumulate
from tests.support.toy import Run, ToyPairs

ROOT = Path(__file__).parents[2]


def environment(rank: int | None = None, count: int = 1, port: int = 0, **more: str) -> dict[str, str]:
    """One thread, offline, this checkout, and no trace of an outer launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {name: value for name, value in os.environ.items() if name not in names}
    base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"} | more
    if rank is None:
        return base
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return base | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count: int, *arguments: str, **more: str) -> list[subprocess.Popen[str]]:
    """`python -m tests.support.processes` so many times."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.processes", *arguments]
    return [
        subprocess.Popen(
            command, env=environment(rank, count, port, **more), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str]]:
    """Exit codes and standard errors; nothing is left running."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def gradient(processes: Processes, batch_pairs: int, micro_batch_pairs: int | None, dropout: float = 0.0) -> Any:
    """Of the adapter and the sums of one step, away from the start, where B = 0 hides half of it."""
    run = Run(Path(), dropout=dropout)
    parameters = run.adapters.parameters()
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    stream = PairStream(ToyPairs(7), run.family, seed=0, batch_pairs=batch_pairs)
    method = PairMethod(stream, run.family, run.adapters, Dpo(200.0))
    run.adapters.train()
    batch = stream.batch(3)
    sums = accumulate(
        method,
        batch.only(processes.share(batch_pairs)),
        micro_batch_pairs,
        run.family.device,
        "float32",
        Path("none.json"),
    )
    sums = processes.add_up(list(parameters.values()), sums)
    return {name: parameter.grad for name, parameter in parameters.items()} | sums


def trained(processes: Processes, directory: Path, steps: int = 6, **options: Any) -> dict[str, Any]:
    """The adapter in the end, a digest of it after each step, and what the run said."""
    run = Run(directory, dropout=options.pop("dropout", 0.0))
    digests: list[str] = []
    step = run.optimizer.step

    def step_and_note(*args: Any, **kwargs: Any) -> Any:
        value = step(*args, **kwargs)
        weights = b"".join(tensor.numpy().tobytes() for tensor in run.adapters.state_dict().values())
        digests.append(hashlib.sha256(weights).hexdigest())
        return value

    def measure() -> dict[str, float]:
        assert processes.is_main
        return {"accuracy": round(run.adapters.norm()) / 100, "margin": run.adapters.norm()}

    run.optimizer.step = step_and_note
    if "held_out_every_steps" in options:
        options["held_out"] = measure
    result: dict[str, Any] = {"digests": digests, "failure": None}
    if "act" in options:
        options["method"] = _acting(run, options.pop("act"))
    try:
        result["resumed_from"] = run.train(steps, processes=processes, **options).resumed_from
    except LoraDpoError as error:
        result["failure"] = (type(error).__name__, error.exit_code, str(error))
    return result | {"adapter": run.adapters.state_dict(), "messages": run.reporter.messages}


def watched(processes: Processes, directory: Path) -> dict[str, Any]:
    """With an average, held-out numbers, a spike that it goes back from, and the best step's weights in the end."""

    def spike(step: int, part: Any, parts: LossParts) -> LossParts | None:
        if step not in range(10, 15):
            return None
        raised = {"error_winner": 3.0 * parts.sums["ref_error_winner"]}
        return LossParts(parts.loss, parts.per_pair, parts.sums | raised)

    return trained(
        processes, directory, 24, act=spike, ema_decay=0.8, held_out_every_steps=3, export="best", spike_factor=2.0,
        learning_rate=lambda step: 1e-3, save_every_steps=4,
    )  # fmt: skip


def _acting(run: Run, act: Any) -> Any:
    """The run's method; `act(step, part, parts)` may replace the loss of a part."""

    class Acting(Method):
        def __init__(self) -> None:
            self.step = -1

        def batches(self, start_step: int) -> Any:
            for batch in run.method.batches(start_step):
                self.step = batch.step
                yield batch

        def loss(self, part: Any) -> LossParts:
            parts = run.method.loss(part)
            return act(self.step, part, parts) or parts

    return Acting()


def scenario(name: str, processes: Processes, directory: Path) -> Any:
    def poison(step: int, part: Any, parts: LossParts) -> LossParts | None:
        if step != 3 or processes.rank != 1:
            return None
        (directory / "poisoned.txt").write_text(part.keys[0])
        per_pair = parts.per_pair.clone()
        per_pair[0] = math.nan
        return LossParts(parts.loss * math.nan, per_pair, parts.sums)

    def stop_once(step: int, part: Any, parts: LossParts) -> None:
        if step == 3 and processes.rank == 1:
            for _ in range(2):  # a launcher's Ctrl-C arrives twice
                os.kill(os.getpid(), signal.SIGINT)

    match name:
        case "gradients":
            cases = [(4, None), (4, 1), (4, 2), (3, None), (3, 1), (5, 2)]
            return {f"{batch} {micro}": gradient(processes, batch, micro) for batch, micro in cases}
        case "dropout":
            return gradient(processes, 4, 2, dropout=0.3)
        case "whole":
            return trained(processes, directory / "whole")
        case "begun":
            return trained(processes, directory / "begun", 4)
        case "resumed":
            return trained(processes, directory / "resumed")
        case "poisoned":
            return trained(processes, directory / "poisoned", act=poison)
        case "stopped":
            return trained(processes, directory / "stopped", act=stop_once, save_every_steps=100)
        case "watched":
            return watched(processes, directory / "watched")
        case "others":
            return trained(processes, directory / "others", identity={"data": f"of {processes.rank}", "seed": 0})
        case "too many":
            try:
                processes.share(1)
            except UserError as error:
                return str(error)
            return None
        case "blocked":
            return trained(processes, directory / "blocked")
        case "long":
            return trained(processes, directory, 400, save_every_steps=7)
    raise ValueError(name)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    joined, _ = connect(torch.device("cpu"))
    for each in sys.argv[2:]:
        torch.manual_seed(joined.rank)  # nothing may depend on the global state
        torch.save(scenario(each, joined, folder), folder / f"{each}-{joined.rank}.pt")
    if "long" not in sys.argv[2:]:  # which doesn't end well
        joined.close()
