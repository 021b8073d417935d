"""A tiny SDXL with cached pairs and a trained-enough adapter, in about a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.data.framing import Framing
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.data.screening import Ties
from lora_dpo.families import Family
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods.stream import PairStream
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl

PAIRS = 10


@dataclass(frozen=True)
class World:
    """A saved random base model and its cached pairs; every test loads the model anew."""

    kind: type[SDXL] | type[StableDiffusion]
    base: Path
    data: Path
    cache: Path
    framing: Framing | int = 64

    def family(self) -> Family:
        return self.kind(self.base)

    def pairs(self, family: Family, *, ties: Ties = "drop") -> CachedPairs:
        return fill(PickAPicParquet(self.data, ties=ties), family, self.cache, self.framing)


def make_world(directory: Path, kind: type[SDXL] | type[StableDiffusion] = SDXL, **options: str) -> World:
    save = save_random_sdxl if kind is SDXL else save_random_sd
    base = save(directory / "base", **options)
    return World(kind, base, save_random_pairs(directory / "pairs.parquet", PAIRS), directory / "cache")


# The small SDXL takes half the step of the small Stable Diffusion.
BUCKETS = Framing(32, aspect="buckets", bucket_step=8)
SQUARE, TALL, WIDE = (32, 32), (40, 24), (24, 40)
# (height, width) of pairs' pictures, and the bucket that they share; twice as large for Stable Diffusion.
SHAPES = [
    ((64, 64), (70, 70)),
    ((50, 90), (60, 100)),
    ((100, 60), (90, 54)),
    ((64, 64), (96, 40)),
    ((60, 100), (64, 64)),
]
SHARED = [SQUARE, WIDE, TALL, TALL, SQUARE]


def make_mixed_world(directory: Path, kind: type[SDXL] | type[StableDiffusion] = SDXL, **options: str) -> World:
    """As `make_world`, with pictures of several shapes in buckets."""
    world = make_world(directory, kind, **options)
    data = save_random_pairs(directory / "mixed.parquet", PAIRS, shapes=SHAPES)
    framing = BUCKETS if kind is SDXL else replace(BUCKETS, resolution=64, bucket_step=16)
    return replace(world, data=data, framing=framing)


def attach(family: Family, *, seed: int = 0, moved: float = 0.0, **options) -> Adapters:
    """Adapters on the family's denoiser; `moved` > 0 gives B random weights of that size, as training would."""
    settings = {"rank": 4, "alpha": 4.0, "targets": "attention"} | options
    adapters = Adapters.attach(family.denoiser, seed=seed, **settings)
    if moved:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapters.parameters().items():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * moved
    return adapters


def stream(pairs: CachedPairs, family: Family, *, seed: int = 0, batch_pairs: int = 8, **options) -> PairStream:
    return PairStream(pairs, family, seed=seed, batch_pairs=batch_pairs, **options)
