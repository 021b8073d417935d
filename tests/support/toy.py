"""A family of one linear layer with made-up pairs: an optimizer step in a few milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lora_dpo import optimizers
from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPair, CachedPairs
from lora_dpo.families import Family, Moments, uncropped
from lora_dpo.families.schedule import Schedule
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.methods.stream import PairStream
from lora_dpo.train import TrainResult, train

SHAPE = (4, 12, 12)
SIZE = 4 * 12 * 12


class ToyFamily(Family):
    name = "toy"
    latent_scale, size_multiple, latent_channels, resolution = 8, 8, 4, 96

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.schedule = Schedule({"num_train_timesteps": 100})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._net = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, SIZE))

    @property
    def denoiser(self) -> nn.Module:
        return self._net

    def latents(self, moments, noise):
        return moments.mean + moments.std * noise

    def with_geometry(self, conditioning, geometry):
        return conditioning

    def predict(self, x_t, t, conditioning):
        return self._net(x_t).view(-1, *SHAPE) + conditioning["prompt"].view(-1, 1, 1, 1)

    def encode_images(self, pixels):
        raise AssertionError("the toy's pairs are encoded")

    encode_prompts = cut_prompts = decode = release_encoders = release = pipeline = fingerprint = encode_images  # pyright: ignore


class ToyPairs(CachedPairs):
    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self._made = torch.randn(n, 2, 1, *SHAPE, generator=generator)
        self.keys = [f"pair-{index}" for index in range(n)]
        self.origins = [f"toy:{index}" for index in range(n)]
        self.prompts = [f"prompt {index}" for index in range(n)]

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, index):
        winner, loser = (Moments(mean, torch.full_like(mean, 0.1)) for mean in self._made[index])
        return CachedPair(winner, loser, uncropped(96, 96), uncropped(96, 96), index)

    def prompt_index(self, index):
        return index

    def size(self, index):
        return 96, 96

    def conditioning(self, prompt_indices):
        return {"prompt": torch.tensor([0.01 * index for index in prompt_indices])}


class Silent:
    """A `Progress` that remembers its messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.advanced = 0

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        self.total, self.advanced = total, done

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.advanced += n

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stop(self) -> None:
        pass


class Run:
    """One training run of the toy, as a process would set it up: everything is built anew."""

    def __init__(self, directory: Path, *, optimizer: str = "adamw", seed: int = 0, dropout: float = 0.0) -> None:
        self.directory, self.reporter = directory, Silent()
        family = ToyFamily()
        self.family = family
        self.adapters = Adapters.attach(family.denoiser, rank=8, alpha=8.0, targets=["1"], dropout=dropout, seed=seed)
        stream = PairStream(ToyPairs(7), family, seed=seed, batch_pairs=4)
        self.method = PairMethod(stream, family, self.adapters, Dpo(200.0))
        self.optimizer = optimizers.build(optimizer, self.adapters.parameters(), learning_rate=1.0)

    def train(self, steps: int = 6, **options) -> TrainResult:
        settings = {
            "method": self.method,
            "optimizer": self.optimizer,
            "learning_rate": lambda step: optimizers.learning_rate_at(
                step, schedule="cosine", learning_rate=1e-2, steps=6, warmup_steps=2
            ),
            "identity": {"data": "toy", "method": {"beta": 200.0}},
            "save_every_steps": 2,
            "micro_batch_pairs": 2,
        } | options
        return train(
            adapters=self.adapters,
            steps=steps,
            run_dir=self.directory,
            reporter=self.reporter,
            device=self.family.device,
            **settings,
        )
