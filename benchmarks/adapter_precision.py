"""What it costs to compute LoRA in float32 beside a base in bfloat16: peft's layers against this package's.

    python benchmarks/adapter_precision.py --resolution 1024 --repeats 7

Both train float32 weights. peft casts each layer's input to float32; here the weights are cast to bfloat16. Memory is
that of what autograd keeps for one pair's policy pass of SDXL's whole UNet, without gradient checkpointing, counted
under fake tensors: shapes and storages are the true ones, nothing is computed. Time is the processor's for forward
and backward of one of its transformer blocks, in the true size; the ways take turns, and ratios are medians over the
rounds. Prints a table, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lora_dpo.adapters import Adapters, target_names

SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
WAYS = ("plain peft", "lora-dpo", "plain peft, DoRA", "lora-dpo, DoRA")


def adapt(model: nn.Module, way: str, rank: int, targets: str = "attention") -> None:
    """Float32 adapters on a frozen model."""
    dora = way.endswith("DoRA")
    if way.startswith("plain peft"):
        names = target_names(model, targets)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=dora), model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
    else:
        Adapters.attach(model, rank=rank, alpha=rank, targets=targets, seed=0, dora=dora)


class Kept:
    """Bytes of the distinct storages that autograd keeps, parameters apart, by element type."""

    def __init__(self, model: nn.Module) -> None:
        self._not = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.bytes: dict[str, int] = {}

    @contextmanager
    def counted(self):
        seen = set(self._not)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                kind = str(tensor.dtype).removeprefix("torch.")
                self.bytes[kind] = self.bytes.get(kind, 0) + storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def kept_by_the_unet(way: str | None, resolution: int, images: int, rank: int, autocast: bool) -> dict[str, int]:
    """Bytes by element type; `way` None: the base alone, its input requiring a gradient."""
    side = resolution // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL).to(torch.bfloat16).requires_grad_(False)
    if way is not None:
        adapt(unet, way, rank)
    with FakeTensorMode():
        for module in unet.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    module._parameters[name] = nn.Parameter(new, old.requires_grad)
            for name, old in module._buffers.items():
                if old is not None:
                    module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
        kept = Kept(unet)
        inputs = {
            "sample": torch.zeros(images, 4, side, side, dtype=torch.bfloat16),
            "timestep": torch.zeros(images, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(images, 77, 2048, dtype=torch.bfloat16),
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(images, 1280, dtype=torch.bfloat16),
                "time_ids": torch.zeros(images, 6, dtype=torch.bfloat16),
            },
        }
        with kept.counted(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = unet(**inputs).sample
        del output
    return kept.bytes


def block(way: str, rank: int, dtype: torch.dtype, tokens: int) -> Callable[[], float]:
    """Processor seconds of forward and backward of SDXL's largest kind of transformer block, one pair."""
    torch.manual_seed(0)
    model = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048).to(dtype).requires_grad_(False)
    adapt(model, way, rank)
    x = torch.randn(2, tokens, 1280, dtype=dtype, requires_grad=True)
    context = torch.randn(2, 77, 2048, dtype=dtype)

    def once() -> float:
        started = time.process_time()
        model(x, encoder_hidden_states=context).float().square().mean().backward()
        return time.process_time() - started

    return once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    memory: dict[str, dict[str, float]] = {}
    for autocast in (False, True):
        mode = "autocast" if autocast else "bfloat16"
        for way in WAYS:
            found = kept_by_the_unet(way, arguments.resolution, 2, arguments.rank, autocast)
            memory[f"{way}, {mode}"] = {kind: round(n / 2**30, 3) for kind, n in sorted(found.items())} | {
                "total": round(sum(found.values()) / 2**30, 3)
            }
            print(f"{way}, {mode}: {memory[f'{way}, {mode}']} GiB", flush=True)
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        runs = {way: block(way, arguments.rank, dtype, arguments.tokens) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(arguments.repeats + 1):
            for way, once in runs.items():
                took = once()
                if number:  # the first is a warm-up
                    times[way].append(took)
        for way, all_of in times.items():
            key = f"{way}, {str(dtype).removeprefix('torch.')}"
            seconds[key] = round(statistics.median(all_of), 4)
            rounds = zip(all_of, times[WAYS[0]], strict=True)
            ratios[key] = round(statistics.median(mine / theirs for mine, theirs in rounds), 3)
            print(f"{key}: {seconds[key]:.3f} s a block, {ratios[key]:.3f} of {WAYS[0]}", flush=True)
    print(json.dumps({
        "resolution": arguments.resolution, "rank": arguments.rank, "kept_gib": memory, "block_seconds": seconds,
        "block_ratios": ratios,
        "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__}, "commit": _commit(),
    }))  # fmt: skip
    return 0


def _commit() -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
