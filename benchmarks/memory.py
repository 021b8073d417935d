"""What `lora-dpo plan` says of memory beside what is taken, setting by setting.

    python benchmarks/memory.py --case sdxl --resolution 512 --work /tmp/sdxl --json

Each setting is a process of its own. "encoding" is the VAE on a batch of pictures. In the others the base is loaded,
adapters and optimizer are made as `lora-dpo train` makes them, and three optimizer steps follow: the first gives the
optimizer its state, the second is measured from outside, the third is counted. Beside the plan's peak stand

    counted    the most bytes that tensors held at a time, by the ledger that the plan's trace is counted with
    measured   of a GPU, what torch had allocated at most; of a CPU, the process's largest resident set, less what the
               process had before the networks were loaded

and the plan's errors, in % of these. Bases of true size have random weights (`true_size.py`). Prints a table, and with
--json a last line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import psutil
import torch
from step_modes import CASES, load_recipe

from lora_dpo import inputs, memory, parts, peak_memory
from lora_dpo.adapters import Adapters
from lora_dpo.cache import default_images_per_batch
from lora_dpo.fake_device import CUDA_BLOCK_BYTES, Kind
from lora_dpo.fitting import with_changes
from lora_dpo.ledger import ADAPTER, ELSEWHERE, GRADIENTS, OPTIMIZER, WEIGHTS, Ledger, Peak
from lora_dpo.memory import ENCODE_IMAGES, GIB, TRAINING, Estimate
from lora_dpo.progress import NoProgress
from lora_dpo.recipe import Recipe
from lora_dpo.step import Step

ENCODING = "encoding"
SETTINGS: dict[str, dict[str, Any]] = {
    ENCODING: {},
    "plain": {},
    "split": {"train.pair_pass": "split"},
    "checkpointing": {"train.gradient_checkpointing": "full"},
    "split, checkpointing": {"train.pair_pass": "split", "train.gradient_checkpointing": "full"},
    "int8, checkpointing": {"base.quantization": "int8", "train.gradient_checkpointing": "full"},
    "nf4, checkpointing": {"base.quantization": "nf4", "train.gradient_checkpointing": "full"},
}
WHOLE_STEP = "step"


def measure_encoding(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """GiB: planned, counted and measured, of the VAE on one batch; the pairs are encoded too, for the others."""
    kind, family = kind_of(device), parts.family(recipe, device)
    planned = memory.estimate(recipe, kind, [ENCODE_IMAGES])
    before = resident_gib()
    vae: Any = family._autoencoder()  # pyright: ignore[reportAttributeAccessIssue]
    side, batch = recipe.data.resolution, default_images_per_batch(recipe.data.resolution)
    pixels = torch.rand(batch, 3, side, side)
    peak_memory.restart(device)
    began = time.perf_counter()
    family.encode_images(pixels)
    seconds = time.perf_counter() - began
    measured = peak_memory.gib(device)
    ledger = new_ledger(kind)
    ledger.count_module(WEIGHTS, vae)
    with ledger, ledger.during(ENCODE_IMAGES):
        family.encode_images(pixels.clone())
    inputs.pairs(recipe, family, parts.cache_dir(recipe), NoProgress())
    return compared(planned, ledger.peaks[ENCODE_IMAGES], measured, before, kind) | {"seconds": [seconds]}


def measure_step(recipe: Recipe, device: torch.device, work: Path) -> dict[str, Any]:
    """GiB: planned, counted and measured, of one optimizer step."""
    kind, family = kind_of(device), parts.family(recipe, device)
    pairs = inputs.pairs(recipe, family, parts.cache_dir(recipe), NoProgress())
    planned = memory.estimate(recipe, kind, TRAINING)
    before = resident_gib()
    adapters = parts.adapters(recipe, family, None, print)
    method = parts.method(recipe, pairs, family, adapters)
    step = Step(
        method=method,
        adapters=adapters,
        optimizer=parts.optimizer(recipe, adapters),
        device=device,
        not_finite=work / "not_finite.json",
        micro_batch_pairs=recipe.train.micro_batch_pairs,
        max_grad_norm=recipe.train.max_grad_norm,
        precision=recipe.train.precision,
    )
    batches, rate = method.batches(0), recipe.train.learning_rate
    lines = [step(next(batches), rate)]
    peak_memory.restart(device)
    lines.append(step(next(batches), rate))
    measured = peak_memory.gib(device)
    with counting(family.denoiser, adapters, step.optimizer, kind) as ledger, ledger.during(WHOLE_STEP):
        step(next(batches), rate)
    seconds = [line["seconds"] for line in lines]
    return compared(planned, ledger.peaks[WHOLE_STEP], measured, before, kind) | {"seconds": seconds}


def compared(planned: Estimate, counted: Peak, measured: float, before: float, kind: Kind) -> dict[str, Any]:
    peak = planned.phases[planned.highest()]
    taken = measured - (before if kind == "cpu" else 0.0)
    return {
        "planned_gib": peak.total / GIB,
        "counted_gib": counted.total / GIB,
        "measured_gib": taken,
        "error_to_counted_percent": 100 * (peak.total / counted.total - 1),
        "error_to_measured_percent": 100 * (peak.total / GIB / taken - 1),
        "phase": planned.highest(),
        "planned_parts_gib": {name: size / GIB for name, size in peak.parts.items()},
        "counted_parts_gib": {name: size / GIB for name, size in counted.parts.items()},
        "process_before_gib": before,
    }


def kind_of(device: torch.device) -> Kind:
    return "cuda" if device.type == "cuda" else "cpu"


def resident_gib() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / GIB


def new_ledger(kind: Kind) -> Ledger:
    """On a GPU, of what lies there."""
    return Ledger(block=CUDA_BLOCK_BYTES, device="cuda") if kind == "cuda" else Ledger()


@contextmanager
def counting(denoiser: Any, adapters: Adapters, optimizer: torch.optim.Optimizer, kind: Kind) -> Iterator[Ledger]:
    """Scope of a ledger that knows what is there already."""
    ledger = new_ledger(kind)
    ledger.count_module(WEIGHTS, denoiser)
    ledger.count(ADAPTER, adapters.parameters().values())
    paged = {
        id(tensor)
        for parameter, state in optimizer.state.items()
        for tensor in state.values()
        if getattr(tensor, "is_paged", False) and parameter.numel() >= memory.PAGED_ELEMENTS
    }
    for state in optimizer.state.values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                ledger.count(ELSEWHERE if id(tensor) in paged else OPTIMIZER, [tensor])
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.count(GRADIENTS, [p.grad]))
        for parameter in adapters.parameters().values()
    ]
    with ledger:
        yield ledger
    for hook in hooks:
        hook.remove()


def table(found: dict[str, dict[str, Any]]) -> str:
    width = max(len(name) for name in found)
    heads = ("planned", "counted", "error %", "measured", "error %", "step s")
    lines = [f"{'GiB':<{width}}" + "".join(f"{head:>10}" for head in heads)]
    for name, one in found.items():
        values = (
            f"{one['planned_gib']:.3f}",
            f"{one['counted_gib']:.3f}",
            f"{one['error_to_counted_percent']:+.2f}",
            f"{one['measured_gib']:.3f}",
            f"{one['error_to_measured_percent']:+.2f}",
            f"{one['seconds'][-1]:.1f}",
        )
        lines.append(f"{name:<{width}}" + "".join(f"{value:>10}" for value in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tinyworld")
    parser.add_argument("--resolution", type=int, help="pixels; default: the case's")
    parser.add_argument("--pairs", type=int, default=1, help="pairs in a pass, and in a step")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="folder that keeps the base model; default: a temporary one")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = parts.device(chosen.device)
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = chosen.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        recipe = load_recipe(chosen.case, work, max(2, chosen.pairs), chosen.resolution)
        passes = {"train.batch_pairs": chosen.pairs, "train.micro_batch_pairs": chosen.pairs}
        if chosen.one is not None:
            changed = with_changes(recipe, passes | SETTINGS[chosen.one])
            one = measure_encoding(changed, device) if chosen.one == ENCODING else measure_step(changed, device, work)
            print(json.dumps(one))
            return
        found = {name: apart(name, work) for name in chosen.settings}
    print(table(found))
    worst = {
        f"worst_{error}": max((one[error] for one in found.values()), key=abs)
        for error in ("error_to_counted_percent", "error_to_measured_percent")
    }
    figures = worst | {
        "case": chosen.case,
        "resolution": recipe.data.resolution,
        "pairs_per_pass": chosen.pairs,
        "settings": found,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if chosen.json:
        print(json.dumps(figures))


def apart(name: str, work: Path) -> dict[str, Any]:
    """The setting's figures, from a process of its own with this one's arguments."""
    print(f"{name} …", file=sys.stderr, flush=True)
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    command = [sys.executable, sys.argv[0], *arguments, "--work", str(work), "--one", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{name} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
