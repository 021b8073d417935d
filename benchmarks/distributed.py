"""What several processes send per step, and why in one bucket: one all-reduce against one per parameter.

    python benchmarks/distributed.py --rank 16 --repeats 9

The parameters have the shapes of a LoRA on the attention layers of SDXL's UNet. Two processes on this machine, over
gloo; both ways take turns, so that what else the machine does meets both. Prints a table, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import distributed, nn

from lora_dpo.adapters import target_names
from lora_dpo.distributed import Processes, connect

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}
PROCESSES = 2


def parameters(rank: int, targets: str) -> list[nn.Parameter]:
    """A and B of every target layer, with gradients."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    shapes = []
    for name in target_names(unet, targets):
        layer = unet.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        shapes += [(rank, layer.in_features), (layer.out_features, rank)]
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape)
    return made


def one_by_one(made: list[nn.Parameter]) -> None:
    for parameter in made:
        assert parameter.grad is not None
        distributed.all_reduce(parameter.grad)


def measure(processes: Processes, made: list[nn.Parameter], repeats: int) -> dict[str, list[float]]:
    sums = {name: torch.tensor(0.0) for name in ("loss", "margin", "error_winner", "error_loser")}
    ways = {"one bucket": lambda: processes.add_up(made, sums), "one by one": lambda: one_by_one(made)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first one is not counted
        for name, way in ways.items():
            distributed.barrier()
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
            for parameter in made:
                assert parameter.grad is not None
                parameter.grad.mul_(1 / processes.count)
    return seconds


def work(rank: int, targets: str, repeats: int) -> None:
    processes, _ = connect(torch.device("cpu"))
    made = parameters(rank, targets)
    seconds = measure(processes, made, repeats)
    if processes.is_main:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        count = sum(parameter.numel() for parameter in made)
        print(f"{'way':<12}{'all-reduces':>12}{'median s':>10}")
        for name, calls in (("one bucket", 1), ("one by one", len(made))):
            print(f"{name:<12}{calls:>12}{medians[name]:>10.3f}")
        result = {
            "parameters": count,
            "tensors": len(made),
            "bytes_per_step": 4 * (count + 4),
            "median_seconds": medians,
            "ratio_median": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "repeats": repeats,
            "processes": processes.count,
            "backend": distributed.get_backend(),
            "cpus": os.cpu_count(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        }
        print(json.dumps(result))
    processes.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    if "RANK" in os.environ:
        work(chosen.rank, chosen.targets, chosen.repeats)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in range(PROCESSES):
        place = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        started.append(subprocess.Popen(command, env=os.environ | place))
    sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    main()
