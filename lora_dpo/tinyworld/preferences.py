"""Makes the tiny world's preference set: pictures sampled from its own base, judged by its own annotators.

The product is one parquet file in Pick-a-Pic's columns, with a `split` column (train and held-out prompts are disjoint)
and the noise-free judgement in `label_0_clean`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .. import atomic
from ..randomness import numpy_generator
from . import scenes, taste
from .verifier import measure

STEPS, GUIDANCE = 10, 5.0


@dataclass(frozen=True)
class Plan:
    """Sizes of the set; the defaults made the shipped file."""

    seed: int = 7
    train_prompts: int = 1_000
    heldout_prompts: int = 200
    pictures_per_prompt: int = 4


def prompts(plan: Plan) -> list[str]:
    """Distinct captions, the train split's first."""
    found: dict[str, None] = {}
    for index in itertools.count():
        found[scenes.write(scenes.draw_facts(numpy_generator(plan.seed, "preference prompt", index)))] = None
        if len(found) == plan.train_prompts + plan.heldout_prompts:
            return list(found)
    raise AssertionError("unreachable: the loop returns")


def make(base: Path, target: Path, plan: Plan | None = None, log: Callable[[str], None] = print) -> Path:
    """Samples, judges and writes the preference set.

    Args:
        base: folder of the tiny world's pipeline.
        target: the parquet file to write. Sampled pictures wait beside it in `<target>.pictures.npz` parts, so that an
            interrupted run goes on where it was.
    """
    plan = plan or Plan()
    captions = prompts(plan)
    n = plan.pictures_per_prompt
    parts = target.with_name(target.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    pipe, rows = None, []
    for start in range(0, len(captions), 32):
        part, chunk = parts / f"{start:05d}.npy", captions[start : start + 32]
        if not part.exists():
            pipe = pipe or _load(base)
            _save(part, _pictures(pipe, chunk, plan))
            log(f"sampled {(start + len(chunk)) * n}/{len(captions) * n} pictures")
        pixels = np.load(part)  # uint8 [prompts, pictures, 64, 64, 3]
        for offset, caption in enumerate(chunk):
            split = "train" if start + offset < plan.train_prompts else "heldout"
            rows.extend(_pairs(plan.seed, caption, pixels[offset], split))
    _write(target, rows)
    return target


def _load(base: Path) -> Any:
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pictures(pipe: Any, captions: list[str], plan: Plan) -> np.ndarray:
    from ..sampling import sample

    n = plan.pictures_per_prompt
    many = [c for c in captions for _ in range(n)]
    seeds = [plan.seed * 1000 + i for _ in captions for i in range(n)]
    images = sample(pipe, many, seeds, steps=STEPS, guidance=GUIDANCE, height=scenes.SIZE, width=scenes.SIZE, batch=64)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels.reshape(len(captions), n, scenes.SIZE, scenes.SIZE, 3)


def _pairs(seed: int, caption: str, pixels: np.ndarray, split: str) -> list[dict[str, object]]:
    encoded = [_jpeg(p) for p in pixels]
    # Judged as stored: the compressed picture is what a trainer will see.
    stored = np.stack([np.asarray(Image.open(io.BytesIO(e)).convert("RGB")) for e in encoded])
    measured = measure(stored.transpose(0, 3, 1, 2).astype(np.float32) / 255, [caption] * len(stored))
    uids = [hashlib.blake2b(e, digest_size=8).hexdigest() for e in encoded]
    rows = []
    for i, j in itertools.combinations(range(len(pixels)), 2):
        key = f"{caption}/{i}/{j}"
        if numpy_generator(seed, "side", key).random() < 0.5:
            i, j = j, i
        seen, clean, person = taste.label(seed, key, measured[i], measured[j])
        best = {1.0: uids[i], 0.0: uids[j]}.get(seen, "tie")
        rows.append(
            {
                "are_different": encoded[i] != encoded[j],
                "best_image_uid": best,
                "caption": caption,
                "has_label": True,
                "image_0_uid": uids[i],
                "image_1_uid": uids[j],
                "jpg_0": encoded[i],
                "jpg_1": encoded[j],
                "label_0": seen,
                "label_1": 1 - seen,
                "label_0_clean": clean,
                "model_0": "tinyworld",
                "model_1": "tinyworld",
                "ranking_id": hashlib.blake2b(key.encode(), digest_size=6).hexdigest(),
                "user_id": person,
                "split": split,
            }
        )
    return rows


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0, optimize=True)
    return buffer.getvalue()


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with atomic.clear_os_errors(path, "choose another folder"):
        atomic.replace(path, buffer.getvalue())


def _write(target: Path, rows: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist(rows)
    # Every picture is in several pairs; one dictionary per row group stores it once.
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, row_group_size=len(rows) // 4 + 1, compression="zstd", use_dictionary=True,
        dictionary_pagesize_limit=1 << 26, write_statistics=False,
    )  # fmt: skip
    with atomic.clear_os_errors(target, "choose another folder"):
        atomic.replace(target, buffer.getvalue())
