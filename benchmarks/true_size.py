"""A base model of the true architecture with random weights, trained by the command line, killed, resumed, exported.

    python benchmarks/true_size.py sdxl --work /tmp/true-size --resolution 512 --steps 4

The base is saved as a diffusers folder of sharded safetensors (SDXL: 2.6 billion parameters of UNet) and trained
with the shipped recipe and overrides. Two runs: one is killed with SIGKILL after a checkpoint and started again, one
is left alone. Both adapters must be the same, bit for bit. Then `lora-dpo export` reads one back. Prints a table, and
a last line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = 49408
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "sample_size": 128,
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
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
}
RECIPES = {"sdxl": "sdxl_lora", "sd15": "sd15_lora"}


def save_base(kind: str, path: Path) -> None:
    """The pipeline's folder, in bfloat16; an existing one is kept."""
    if (path / "model_index.json").is_file():
        return
    torch.manual_seed(0)
    words = _tokenizer()
    common = {
        "vae": _random(AutoencoderKL, _VAE | {"scaling_factor": 0.13025 if kind == "sdxl" else 0.18215}),
        "text_encoder": _random(CLIPTextModel, _text(words, 768, 12, 12, 3072)),
        "tokenizer": words,
        "unet": _random(UNet2DConditionModel, UNETS[kind]),
    }
    if kind == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            **common,
            text_encoder_2=_random(CLIPTextModelWithProjection, _text(words, 1280, 32, 20, 5120)),
            tokenizer_2=words,
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            **common,
            scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path, max_shard_size="2GB")


_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def _random(kind: Any, config: Any) -> Any:
    """Made without weights, then filled with the layers' own initial values, in bfloat16."""
    with torch.device("meta"):
        model = (kind(**config) if isinstance(config, dict) else kind(config)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    for name, parameter in model.named_parameters():
        if ("embedding" in name and parameter.dim() == 2) or not parameter.isfinite().all():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _text(words: CLIPTokenizer, width: int, layers: int, heads: int, inner: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def _tokenizer() -> CLIPTokenizer:
    """CLIP's, without merges: its vocabulary of 49,408 words is not part of any weights."""
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(f"{character}</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[], model_max_length=77)


def save_pairs(path: Path, count: int, side: int) -> None:
    """Noise pictures in Pick-a-Pic's columns."""
    random = np.random.default_rng(0)

    def picture() -> bytes:
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG")
        return file.getvalue()

    rows = [
        {
            "jpg_0": picture(),
            "jpg_1": picture(),
            "label_0": float(n % 2),
            "label_1": 1.0 - n % 2,
            "caption": f"blob {n}",
        }
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def overrides(kind: str, work: Path, resolution: int, steps: int, batch_pairs: int) -> list[str]:
    """Of the shipped recipe: this base model and these pairs, few steps, no samples, one held-out pair at the end."""
    return [
        f"data.path={work / 'pairs.parquet'}",
        f"base.model={work / 'base'}",
        *([f"base.vae={work / 'base' / 'vae'}"] if kind == "sdxl" else []),
        "base.dtype=bfloat16",
        f"data.resolution={resolution}",
        f"train.steps={steps}",
        f"train.batch_pairs={batch_pairs}",
        "train.micro_batch_pairs=1",
        "train.save_every_steps=2",
        "train.warmup_steps=0",
        "train.learning_rate=1e-4",
        "evaluate.prompts=0",
        "evaluate.implicit_pairs=1",
        f"evaluate.every_steps={steps}",
        "evaluate.every_steps_pairs=1",
        f"output.cache_dir={work / 'cache'}",
    ]


def train(command: list[str], run: Path, *, kill_after: int | None, log: Path) -> float:
    """Seconds until it ends; with `kill_after`, SIGKILL as soon as that many steps are in the metrics."""
    began = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen([*command, "--run-dir", str(run)], stdout=file, stderr=file)
        while process.poll() is None:
            time.sleep(0.2)
            metrics = run / "metrics.jsonl"
            if kill_after and metrics.exists() and len(metrics.read_text().splitlines()) >= kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return time.monotonic() - began
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}; see {log}")
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=UNETS)
    parser.add_argument("--work", type=Path, required=True, help="folder for the base model and the runs")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-pairs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="further section.key=value")
    chosen = parser.parse_args()
    work: Path = chosen.work
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    save_base(chosen.kind, work / "base")
    made = time.monotonic() - began
    save_pairs(work / "pairs.parquet", 8, chosen.resolution)
    lora_dpo = [sys.executable, "-m", "lora_dpo"]
    settings = overrides(chosen.kind, work, chosen.resolution, chosen.steps, chosen.batch_pairs)
    command = [*lora_dpo, "train", RECIPES[chosen.kind], *settings, *chosen.overrides]
    os.environ["HF_HUB_OFFLINE"] = "1"
    runs = {name: work / name for name in ("killed", "whole")}
    log = work / "log.txt"
    first = train(command, runs["killed"], kill_after=3, log=log)
    second = train(command, runs["killed"], kill_after=None, log=log)
    whole = train(command, runs["whole"], kill_after=None, log=log)
    files = [run / "adapter" / "pytorch_lora_weights.safetensors" for run in runs.values()]
    same = files[0].read_bytes() == files[1].read_bytes()
    exported = subprocess.run(
        [*lora_dpo, "export", str(runs["whole"]), "--rank", "4", "--out", str(work / "rank4"), "--json"],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    result = json.loads((runs["whole"] / "result.json").read_text())
    lines = [json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    steps = sorted(line["seconds"] for line in lines[1:])
    figures = {
        "model": chosen.kind,
        "resolution": chosen.resolution,
        "pairs_per_step": chosen.batch_pairs,
        "seconds_per_step": round(steps[len(steps) // 2], 2),
        "peak_memory_gib": result["peak_memory_gib"],
        "held_out_errors": {name: round(result["implicit"][name], 6) for name in ("error_winner", "ref_error_winner")},
        "losses": [round(line["loss"], 6) for line in lines],
        "killed_and_resumed_is_the_same_bit_for_bit": same,
        "verification": result["verification"],
        "kohya": result["adapter_kohya"],
        "rank4": {key: json.loads(exported.stdout)[key] for key in ("error", "resizing_effect", "verification")},
        "seconds": {
            "making the base": round(made, 1),
            "until the kill": round(first, 1),
            "resumed to the end": round(second, 1),
            "uninterrupted": round(whole, 1),
        },
        "device": result["device"],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": result["versions"],
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    for name, value in figures.items():
        print(f"{name:<45} {value}")
    print(json.dumps(figures))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
