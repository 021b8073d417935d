"""One optimizer step of `lora-dpo train` beside one of the published scripts: seconds per pair, in one process.

    python benchmarks/step.py --case sdxl --work /tmp/sdxl --json

All train a LoRA of the same rank on the same UNet's weights, on the same pairs, one pair a step. Modes:

    published           `published.py`: VAE, text encoders, policy with gradient checkpointing, reference, AdamW
    published, bf16     the same with adapters in bfloat16, as the scripts have them under bfloat16 (--bf16-adapters)
    first               ours in the first epoch: pairs are encoded, the reference is computed
    cached              ours in later epochs: the reference's errors are stored (method.reference_cache)
    …, checkpointing    ours with train.gradient_checkpointing = "full"
    bare                forward and backward pass of our policy, and nothing else
    encoding            not a step: what ours computes once per pair before the first epoch

The modes take turns, so that what else the machine does meets all of them; the figures are medians over the turns. On
a machine that others use at the same time, the processor's seconds say more than the clock's: both are printed.
Ours is the package's own: `lora_dpo.parts` makes what the shipped recipe names, `lora_dpo.step` makes the step.
`--profile` says where the time goes. `--variants` compares settings of torch with ours as it is, instead. Bases of true
size have random weights (`true_size.py`). Prints tables, and with --json a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pyarrow.parquet as pq
import torch
from published import Published, share
from step_modes import CASES, VARIANTS, Mode, Ours, Profile, open_ours, variants

from lora_dpo import parts, peak_memory, tinyworld
from lora_dpo.adapters import PRESETS

PUBLISHED, BF16, FIRST, CACHED, BARE = "published", "published, bf16", "first", "cached", "bare"
CHECKPOINTING = ", checkpointing"


def published(ours: Ours, unet: Any, adapter_dtype: torch.dtype, seed: int = 0) -> Published:
    recipe = ours.recipe
    pipeline = ours.family.pipeline()
    if recipe.base.family == "stable_diffusion":  # the script for SD encodes pictures in this precision
        pipeline.vae = type(pipeline.vae).from_config(pipeline.vae.config)
        pipeline.vae.load_state_dict(ours.family.pipeline().vae.state_dict())
        pipeline.vae.requires_grad_(False).to(ours.family.device, ours.family.denoiser.dtype)
    path = tinyworld.preferences_path() if recipe.data.path == "tinyworld" else recipe.data.path
    assert isinstance(recipe.adapter.targets, str)
    return Published(
        pipeline,
        unet,
        pq.read_table(path).slice(0, len(ours.pairs)).to_pylist(),
        resolution=recipe.data.resolution,
        rank=recipe.adapter.rank,
        targets=PRESETS[recipe.adapter.targets],
        beta=float(getattr(recipe.method, "beta", 0.0)),
        learning_rate=recipe.train.learning_rate,
        autocast="bf16" if recipe.train.precision == "bfloat16" else "no",
        adapter_dtype=adapter_dtype,
        device=ours.family.device,
        seed=seed,
    )


def side_by_side(ours: Ours, *, bf16_adapters: bool) -> tuple[dict[str, Mode], dict[str, Published]]:
    """All modes by name, and the published loops among them."""
    denoiser = ours.family.denoiser
    loops = {PUBLISHED: published(ours, share(denoiser), torch.float32)}
    if bf16_adapters:
        loops[BF16] = published(ours, share(denoiser), torch.bfloat16)
    loop = loops[PUBLISHED]
    pixels = loop._pixels(loop.rows[0])[0] / 2 + 0.5
    modes = {name: Mode(one.step) for name, one in loops.items()}
    modes[FIRST] = ours.mode(stored=False)
    modes[CACHED] = ours.mode(stored=True)
    modes[FIRST + CHECKPOINTING] = ours.mode(stored=False, checkpointing="full")
    modes[CACHED + CHECKPOINTING] = ours.mode(stored=True, checkpointing="full")
    modes[BARE] = ours.bare()
    modes["encoding"] = ours.encoding(pixels, loop.rows[0]["caption"])
    return modes, loops


def take_turns(
    modes: dict[str, Mode], networks: list[Any], wait: Callable[[], None], repeats: int, warmup: int
) -> None:
    images = 0

    def count(_: Any, args: tuple[Any, ...]) -> None:
        nonlocal images
        images += len(args[0])

    hooks = [network.register_forward_pre_hook(count) for network in networks]
    for turn in range(warmup + repeats):
        for name, mode in modes.items():
            mode.enter()
            images = 0
            wait()
            began, cpu_began = time.perf_counter(), time.process_time()
            mode.make()
            wait()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            mode.leave()
            if turn == 0:
                mode.cold, mode.images = seconds, images
            if turn >= warmup:
                mode.seconds.append(seconds)
                mode.cpu_seconds.append(cpu_seconds)
            note = " (not counted)" if turn < warmup else ""
            took = f"{seconds:.3f} s, {cpu_seconds:.3f} of the processor"
            print(f"turn {turn + 1} of {warmup + repeats}{note}: {name} {took}", file=sys.stderr)
    for hook in hooks:
        hook.remove()


def profile(
    ours: Ours, modes: dict[str, Mode], loops: dict[str, Published], wait: Callable[[], None], repeats: int
) -> dict[str, dict[str, float]]:
    """Medians of the parts' seconds, by mode; of the processor's seconds, where it does the work."""

    def now() -> float:
        wait()
        return time.perf_counter() if ours.family.device.type == "cuda" else time.process_time()

    found = {}
    for name, mode in modes.items():
        if name in (BARE, "encoding"):
            continue
        turns = []
        for _ in range(repeats):
            mode.enter()
            one = Profile(now)
            began = now()
            if name in loops:
                loops[name].step(one.clock)
            else:
                with one.of(ours):
                    mode.make()
            whole = now() - began
            mode.leave()
            turns.append(one.seconds | {"other": whole - sum(one.seconds.values())})
        found[name] = {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
    return found


def table(modes: dict[str, Mode], against: str) -> str:
    heads = ("median s", "least", "most", "ratio", "CPU s", "ratio", "images", "first call")
    lines = [f"{'mode':<26}" + "".join(f"{head:>11}" for head in heads)]
    for name, mode in modes.items():
        seconds, cpu_seconds = statistics.median(mode.seconds), statistics.median(mode.cpu_seconds)
        values = [seconds, min(mode.seconds), max(mode.seconds), statistics.median(modes[against].seconds) / seconds]
        values += [cpu_seconds, statistics.median(modes[against].cpu_seconds) / cpu_seconds]
        shown = "".join(f"{value:>11.3f}" for value in values)
        lines.append(f"{name:<26}{shown}{mode.images:>11}{mode.cold or 0.0:>11.3f}")
    return "\n".join([*lines, f"ratio: {against} over this mode, of medians; images: through the UNet, forward"])


def profile_table(found: dict[str, dict[str, float]]) -> str:
    rows = list(dict.fromkeys(part for one in found.values() for part in one))
    lines = [" " * 26 + "".join(f"{part:>16}" for part in rows)]
    for name, one in found.items():
        lines.append(f"{name:<26}" + "".join(f"{one[part]:>16.4f}" if part in one else " " * 16 for part in rows))
    return "\n".join(lines)


def ratios(modes: dict[str, Mode]) -> dict[str, Any]:
    """Of medians; above 1 is faster. With the range of the turns' own ratios."""

    def of(one: str, other: str) -> float:
        return statistics.median(modes[one].seconds) / statistics.median(modes[other].seconds)

    def of_cpu(one: str, other: str) -> float:
        return statistics.median(modes[one].cpu_seconds) / statistics.median(modes[other].cpu_seconds)

    def turns(one: str, other: str) -> list[float]:
        both = [a / b for a, b in zip(modes[one].seconds, modes[other].seconds, strict=True)]
        return [min(both), max(both)]

    found: dict[str, Any] = {
        "ratio_first_epoch": of(PUBLISHED, FIRST),
        "ratio_first_epoch_range": turns(PUBLISHED, FIRST),
        "ratio_cached": of(PUBLISHED, CACHED),
        "ratio_cached_range": turns(PUBLISHED, CACHED),
        "ratio_to_bare": of(CACHED, BARE),
        "ratio_to_bare_range": turns(CACHED, BARE),
        "ratio_first_epoch_with_checkpointing": of(PUBLISHED, FIRST + CHECKPOINTING),
        "ratio_cached_with_checkpointing": of(PUBLISHED, CACHED + CHECKPOINTING),
    }
    for name, both in (
        ("first_epoch", (PUBLISHED, FIRST)),
        ("cached", (PUBLISHED, CACHED)),
        ("to_bare", (CACHED, BARE)),
        ("first_epoch_with_checkpointing", (PUBLISHED, FIRST + CHECKPOINTING)),
        ("cached_with_checkpointing", (PUBLISHED, CACHED + CHECKPOINTING)),
    ):
        found[f"cpu_ratio_{name}"] = of_cpu(*both)
    once = statistics.median(modes[FIRST].seconds) + statistics.median(modes["encoding"].seconds)
    found["ratio_first_epoch_with_its_encoding"] = statistics.median(modes[PUBLISHED].seconds) / once
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="tinyworld")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="turns that are not counted")
    parser.add_argument("--resolution", type=int, help="pixels; default: the case's")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="folder that keeps the base model; default: a temporary one")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="compare these (default: all) with our step")
    parser.add_argument("--bf16-adapters", action="store_true", help="the published loop with such adapters too")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = parts.device(chosen.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        peak_memory.restart(device)
        ours = open_ours(chosen.case, work, chosen.pairs, chosen.resolution, device)
        figures: dict[str, Any] = {"case": chosen.case, "resolution": ours.recipe.data.resolution}
        figures |= {"rank": ours.recipe.adapter.rank, "precision": ours.recipe.train.precision}
        loops: dict[str, Published] = {}
        if chosen.variants is None:
            modes, loops = side_by_side(ours, bf16_adapters=chosen.bf16_adapters)
            against = PUBLISHED
        else:
            modes, against = variants(ours, chosen.variants or list(VARIANTS)), CACHED
        networks = [ours.family.denoiser, *(loop.unet for loop in loops.values())]
        take_turns(modes, networks, wait, chosen.repeats, chosen.warmup)
        print(table(modes, against))
        if chosen.variants is None:
            figures |= ratios(modes)
        else:
            medians = {name: statistics.median(mode.seconds) for name, mode in modes.items()}
            figures["speedup"] = {name: medians[CACHED] / seconds for name, seconds in medians.items()}
            cpu = {name: statistics.median(mode.cpu_seconds) for name, mode in modes.items()}
            figures["cpu_speedup"] = {name: cpu[CACHED] / seconds for name, seconds in cpu.items()}
        if chosen.profile:
            figures["profile"] = profile(ours, modes, loops, wait, min(chosen.repeats, 3))
            print(profile_table(figures["profile"]))
    figures |= {
        "median_seconds": {name: statistics.median(mode.seconds) for name, mode in modes.items()},
        "range_seconds": {name: [min(mode.seconds), max(mode.seconds)] for name, mode in modes.items()},
        "median_cpu_seconds": {name: statistics.median(mode.cpu_seconds) for name, mode in modes.items()},
        "first_call_seconds": {name: mode.cold for name, mode in modes.items()},
        "images_forward": {name: mode.images for name, mode in modes.items()},
        "repeats": chosen.repeats,
        "warmup": chosen.warmup,
        "peak_memory_gib": peak_memory.gib(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if chosen.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
