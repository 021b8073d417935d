"""Makes the tiny world's base model from nothing, in stages: scenes → autoencoder → latents → text → denoiser.

Each stage is deterministic given its seed (up to the rounding of the machine's kernels), writes its product once, and
is skipped when the product is there; a stage that was interrupted goes on from its last checkpoint.
"""

# diffusers annotates outputs as the tuples that they are with return_dict=False.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import copy
import functools
import io
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import atomic
from ..randomness import numpy_generator, seed_of, torch_generator
from . import model, scenes
from .render import render

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of the whole pretraining; the defaults made the shipped weights."""

    seed: int = 20261122
    scenes: int = 40_000
    vae_crop_steps: int = 3_000
    vae_full_steps: int = 800
    text_steps: int = 500
    unet_scenes: int = 24_000
    unet_steps: int = 3_000
    unet_batch: int = 32


def pretrain(directory: Path, plan: Plan | None = None, log: Log = print, compiled: bool = False) -> Path:
    """Runs every stage that is not done yet and returns the folder of the finished pipeline.

    Args:
        compiled: `torch.compile` the denoiser, the longest stage: about a sixth faster on a CPU, but compiling takes
            minutes and a C++ compiler.
    """
    plan = plan or Plan()
    directory.mkdir(parents=True, exist_ok=True)
    images, captions = scene_set(directory, plan, log)
    vae = train_autoencoder(directory, images, plan, log)
    latents = encode_all(directory, vae, images[: plan.unet_scenes], log)
    return train_denoiser(directory, vae, latents, captions, plan, log, compiled)


# --- scenes -----------------------------------------------------------------------------------------------------------


def scene_at(seed: int, index: int) -> scenes.Scene:
    """The training scene of an index."""
    return scenes.draw_scene(numpy_generator(seed, "tinyworld scene", index))


def _render_many(arguments: tuple[int, int, int]) -> np.ndarray:
    seed, start, stop = arguments
    return np.stack([render(scene_at(seed, i)) for i in range(start, stop)])


def scene_set(directory: Path, plan: Plan, log: Log) -> tuple[np.ndarray, list[str]]:
    """The training pictures, uint8 [n, 64, 64, 3], and their captions."""
    path = directory / "scenes.npy"
    if not path.exists():
        log(f"rendering {plan.scenes} scenes")
        spans = [(plan.seed, s, min(s + 500, plan.scenes)) for s in range(0, plan.scenes, 500)]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
            _save_array(path, np.concatenate(list(pool.imap(_render_many, spans))))
    captions = [scene_at(plan.seed, i).caption for i in range(plan.scenes)]
    return np.load(path, mmap_mode="r"), captions


# --- autoencoder ------------------------------------------------------------------------------------------------------


def train_autoencoder(directory: Path, images: np.ndarray, plan: Plan, log: Log) -> nn.Module:
    """Crops first (four times as many pictures a second), then whole pictures; latents come out whitened."""
    torch.manual_seed(seed_of(plan.seed, "tinyworld autoencoder"))
    vae = model.autoencoder()
    done = directory / "vae.pt"
    if done.exists():
        vae.load_state_dict(torch.load(done, weights_only=True))
        return vae.eval()

    def batches(step: int) -> tuple[Tensor, bool]:
        crop = step < plan.vae_crop_steps
        rng = numpy_generator(plan.seed, "autoencoder batch", step)
        rows = np.sort(rng.choice(len(images), 16 if crop else 8, replace=False))
        pixels = np.asarray(images[rows])
        if crop:
            y, x = rng.integers(0, 33, 2)
            pixels = pixels[:, y : y + 32, x : x + 32]
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1, crop

    def loss(step: int) -> Tensor:
        pixels, _ = batches(step)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(plan.seed, "autoencoder noise", step))
        error = vae.decode(posterior.mean + posterior.std * noise).sample - pixels
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return 4 * error.square().mean() + 0.5 * error.abs().mean() + 0.3 * edges + 1e-4 * kl

    steps = plan.vae_crop_steps + plan.vae_full_steps

    def rate(step: int) -> float:
        if step < plan.vae_crop_steps:
            return 2.5e-3 * min(1, (step + 1) / 100) * _cosine(step / plan.vae_crop_steps * 0.75, 0.3)
        return 1.0e-3 * _cosine((step - plan.vae_crop_steps) / plan.vae_full_steps, 0.02)

    _fit(vae, loss, rate, steps, directory / "vae.part.pt", log, name="autoencoder", decay=0.99, betas=(0.9, 0.99))
    _whiten(vae, images)
    _save_tensors(done, vae.state_dict())
    return vae.eval()


@torch.no_grad()
def _whiten(vae: nn.Module, images: np.ndarray, count: int = 1024) -> None:
    """Gives every latent channel mean 0 and deviation 1 by folding the change into the two 1×1 convolutions."""
    pixels = torch.from_numpy(np.asarray(images[:count]).copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()  # the other half of the channels is the log-variance
    out.bias += (out.weight[..., 0, 0] * mean).sum(1)
    out.weight *= deviation[None, :, None, None]


@torch.no_grad()
def encode_all(directory: Path, vae: nn.Module, images: np.ndarray, log: Log) -> Tensor:
    """Latent means of every picture, float16 [n, 4, 16, 16]."""
    path = directory / "latents.npy"
    if not path.exists():
        log("encoding the pictures")
        rows = []
        for start in range(0, len(images), 100):
            pixels = torch.from_numpy(np.asarray(images[start : start + 100]).copy()).permute(0, 3, 1, 2)
            rows.append(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean.half().numpy())
        _save_array(path, np.concatenate(rows))
    return torch.from_numpy(np.load(path))


# --- text -------------------------------------------------------------------------------------------------------------

CELLS = 8  # the layout task asks what covers each cell of an 8×8 grid


class _LayoutHead(nn.Module):
    """Asks the text what the picture shows where: one query per grid cell attends to the token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        width = 2 * model.TEXT_WIDTH
        self.queries = nn.Parameter(torch.randn(CELLS * CELLS, width) * 0.05)
        self.attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.mixer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.cell = nn.Linear(2 * width, len(_CELL_KINDS))
        self.whole = nn.Linear(model.TEXT_WIDTH, len(_CELL_KINDS))

    def forward(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.queries.expand(len(tokens), -1, -1)
        seen, _ = self.attention(queries, tokens, tokens, need_weights=False)
        return self.cell(self.mixer(queries + seen)), self.whole(pooled)


_CELL_KINDS = (*scenes.COLOURS, *scenes.SHAPES, *scenes.TEXTURES, *scenes.BACKGROUNDS)


def _layout(scene: scenes.Scene) -> np.ndarray:
    """What covers each cell, as bits over `_CELL_KINDS`: [cells, kinds]."""
    bits = np.zeros((CELLS * CELLS, len(_CELL_KINDS)), np.float32)
    centres = (np.arange(CELLS) + 0.5) * scenes.SIZE / CELLS
    x, y = (axis.ravel() for axis in np.meshgrid(centres, centres))
    bits[:, _CELL_KINDS.index(scene.background)] = 1
    for placed in scene.objects:
        covered = np.hypot(x - placed.x, y - placed.y) < placed.radius
        for word in (placed.item.colour, placed.item.shape, placed.item.texture):
            if word:
                bits[covered, _CELL_KINDS.index(word)] = 1
    return bits


def train_text(directory: Path, plan: Plan, log: Log) -> tuple[nn.Module, nn.Module]:
    """Teaches the text encoders, before any picture, what a caption says about where things are."""
    torch.manual_seed(seed_of(plan.seed, "tinyworld text encoders"))
    words = model.tokenizer()
    encoders = model.text_encoders(words)
    done = directory / "text.pt"
    bundle = nn.ModuleDict({"first": encoders[0], "second": encoders[1]})
    if done.exists():
        bundle.load_state_dict(torch.load(done, weights_only=True))
        return encoders
    bundle["head"] = _LayoutHead()

    def loss(step: int) -> Tensor:
        rng = numpy_generator(plan.seed, "text batch", step)
        drawn = [scenes.draw_scene(rng) for _ in range(96)]
        truth = torch.from_numpy(np.stack([_layout(s) for s in drawn]))
        tokens, pooled = model.encode_text(words, encoders, [s.caption for s in drawn])
        cells, whole = bundle["head"](tokens, pooled)
        return F.binary_cross_entropy_with_logits(cells, truth) + F.binary_cross_entropy_with_logits(
            whole, truth.amax(1)
        )

    def rate(step: int) -> float:
        return 1e-3 * min(1, (step + 1) / 100) * _cosine(step / plan.text_steps, 0.05)

    _fit(
        bundle, loss, rate, plan.text_steps, directory / "text.part.pt", log, name="text", decay=0.99, betas=(0.9, 0.99)
    )
    del bundle["head"]
    _save_tensors(done, bundle.state_dict())
    return encoders


# --- denoiser ---------------------------------------------------------------------------------------------------------


def train_denoiser(
    directory: Path, vae: nn.Module, latents: Tensor, captions: list[str], plan: Plan, log: Log, compiled: bool = False
) -> Path:
    """ε-prediction with min-SNR weights; one caption in ten is dropped for classifier-free guidance."""
    encoders = train_text(directory, plan, log)
    torch.manual_seed(seed_of(plan.seed, "tinyworld denoiser"))
    words, unet = model.tokenizer(), model.denoiser().to(memory_format=torch.channels_last)
    schedule = model.scheduler().alphas_cumprod.float()
    time_ids = torch.tensor([[scenes.SIZE, scenes.SIZE, 0, 0, scenes.SIZE, scenes.SIZE]]).float()
    bundle = nn.ModuleDict({"unet": unet, "first": encoders[0], "second": encoders[1]})
    order = len(latents)
    predict = torch.compile(unet) if compiled else unet

    def loss(step: int) -> Tensor:
        n = plan.unet_batch
        places = [step * n + i for i in range(n)]
        rows = [int(_order(plan.seed, p // order, order)[p % order]) for p in places]
        draw = torch_generator(plan.seed, "denoiser batch", step)
        x = latents[rows].float()
        t = torch.randint(0, len(schedule), (n,), generator=draw)
        noise = torch.randn(x.shape, generator=draw)
        keep = (torch.rand(n, generator=draw) >= 0.1).float()
        tokens, pooled = model.encode_text(words, encoders, [captions[r] for r in rows])
        a = schedule[t][:, None, None, None]
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        extra = {"text_embeds": pooled * keep[:, None], "time_ids": time_ids.expand(n, -1)}
        guess = predict(noisy, t, encoder_hidden_states=tokens * keep[:, None, None], added_cond_kwargs=extra).sample
        snr = schedule[t] / (1 - schedule[t])
        weight = snr.clamp(max=5.0) / snr
        return (weight * (guess - noise).square().mean((1, 2, 3))).mean()

    def rate(step: int) -> float:
        left = (plan.unet_steps - step) / (0.35 * plan.unet_steps)  # constant, then down to nothing
        return 1.0e-3 * min(1.0, (step + 1) / 150, left)

    _fit(
        bundle,
        loss,
        rate,
        plan.unet_steps,
        directory / "unet.part.pt",
        log,
        name="denoiser",
        decay=0.998,
        betas=(0.9, 0.99),
    )
    path = directory / "pipeline"
    pipe = model.pipeline(vae, unet.to(memory_format=torch.contiguous_format), encoders, words)
    pipe.to(torch.float16)
    # Loaded without a dtype, the UNet and the VAE come in float32 but text encoders as they are stored.
    for encoder in encoders:
        encoder.float()
    pipe.save_pretrained(path, safe_serialization=True)
    for file in path.rglob("*"):  # some of it is written for the owner's eyes only; it goes into a wheel
        if file.is_file():
            file.chmod(0o644)
    (directory / "plan.json").write_text(json.dumps(asdict(plan), indent=2) + "\n")
    return path


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return numpy_generator(seed, "denoiser order", epoch).permutation(count)


# --- shared machinery -------------------------------------------------------------------------------------------------


def _fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    rate: Callable[[int], float],
    steps: int,
    checkpoint: Path,
    log: Log,
    *,
    name: str,
    decay: float,
    betas: tuple[float, float],
    every: int = 500,
) -> None:
    """AdamW with an exponential moving average of the weights, which the module holds at the end."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate(0), betas=betas, weight_decay=0.01)
    average = copy.deepcopy(module.state_dict())
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
    began, total = time.perf_counter(), 0.0
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(decay, (step + 1) / (step + 10))
            for key, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    average[key].lerp_(tensor, 1 - keep)
        total += value.item()
        if (step + 1) % 100 == 0:
            speed = (step + 1 - start) / (time.perf_counter() - began)
            eta = (steps - step - 1) / speed / 60
            log(f"{name} step {step + 1}/{steps} loss {total / 100:.4f} {speed:.2f} steps/s eta {eta:.1f} min")
            total = 0.0
        if (step + 1) % every == 0 and step + 1 < steps:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            _save_tensors(checkpoint, {**state, "step": step + 1})
    module.load_state_dict(average)
    checkpoint.unlink(missing_ok=True)


def _cosine(part: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def _save_tensors(path: Path, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic.clear_os_errors(path, "choose another folder"):
        atomic.replace(path, buffer.getvalue())


def _save_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with atomic.clear_os_errors(path, "choose another folder"):
        atomic.replace(path, buffer.getvalue())
