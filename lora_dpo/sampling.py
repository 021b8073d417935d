"""Images from prompts and seeds: one pipeline call per batch, every image a function of its own (seed, prompt)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.progress import Progress
from lora_dpo.randomness import torch_generator

# The order in which diffusers' `encode_prompt` returns them: Stable Diffusion the first two, SDXL all four.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    batch: int = 32,
    negative_prompts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "n 3 H W"]:
    """One image per (prompt, seed), float32 on the CPU in [0, 1].

    The initial noise and, for stochastic schedulers, the noise of every step are drawn on the CPU per image from
    (seed, prompt), so that an image depends on neither the batch size nor its neighbours (beyond float rounding).

    Args:
        pipeline: a Stable Diffusion or SDXL text-to-image pipeline; left as it was, also on exceptions.
        guidance: classifier-free guidance scale; 1.0 switches guidance off.
        height, width: pixels.
        negative_prompts: one per image; None is the pipeline's own unconditional embedding.
        progress: a job of as many units as images.

    Raises:
        UserError: sizes, steps or guidance that the pipeline can't use.
        LoraDpoError: an image with NaN or infinite pixels, naming its prompt and seed.
    """
    with _job(progress, len(prompts), "sample") as advance:
        return _sample(pipeline, prompts, seeds, steps, guidance, height, width, batch, negative_prompts, advance)


def base_and_adapted(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    batch: int = 32,
    negative_prompts: Sequence[str] | None = None,
    reference: Callable[[], AbstractContextManager[object]] | None = None,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "n 3 H W"], Float[Tensor, "n 3 H W"]]:
    """The same (prompt, seed) pairs without and with the adapter, on the same noise; else as `sample`.

    Args:
        reference: a scope in which the adapter is off, such as `Adapters.reference`; by default the LoRA that is
            loaded on the pipeline is switched off and, also after an exception, back to what it was.
        progress: one job over both halves.

    Raises:
        UserError: no LoRA is loaded and no `reference` is given.
    """
    off = reference if reference is not None else lambda: _lora(pipeline, enabled=False)
    on = nullcontext if reference is not None else lambda: _lora(pipeline, enabled=True)
    with _job(progress, 2 * len(prompts), "sample base and adapted") as advance:
        with off():
            base = _sample(pipeline, prompts, seeds, steps, guidance, height, width, batch, negative_prompts, advance)
        with on():
            adapted = _sample(
                pipeline, prompts, seeds, steps, guidance, height, width, batch, negative_prompts, advance
            )
    return base, adapted


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Rounded to 8 bits per channel; values outside [0, 1] are clipped."""
    levels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def save_pngs(
    images: Float[Tensor, "n 3 H W"],
    directory: Path | str,
    names: Sequence[str],
    metadata: Sequence[Mapping[str, object]] | None = None,
) -> list[Path]:
    """One `<name>.png` per image, its metadata (prompt, seed, steps, guidance) as PNG text; complete or absent."""
    if len(names) != len(images) or (metadata is not None and len(metadata) != len(images)):
        raise LoraDpoError(f"{len(images)} images, {len(names)} names: each image needs one name and one metadata")
    directory = Path(directory)
    paths = []
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        if not name or Path(name).name != name:
            raise LoraDpoError(f"{name!r} is not a file name")
        text = PngInfo()
        for key, value in (metadata[index] if metadata is not None else {}).items():
            text.add_text(key, str(value))
        path = directory / (name if name.endswith(".png") else f"{name}.png")
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "PNG", pnginfo=text)
        with atomic.clear_os_errors(path):
            directory.mkdir(parents=True, exist_ok=True)
            atomic.replace(path, buffer.getvalue())
        paths.append(path)
    return paths


def _sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    height: int,
    width: int,
    batch: int,
    negative_prompts: Sequence[str] | None,
    advance: Callable[[int], object],
) -> Float[Tensor, "n 3 H W"]:
    _check(pipeline, prompts, seeds, steps, guidance, height, width, batch, negative_prompts)
    if not prompts:
        return torch.empty(0, 3, height, width)
    images: list[Tensor] = []
    with torch.no_grad(), _for_inference(pipeline):
        negatives = list(negative_prompts) if negative_prompts is not None else [None] * len(prompts)
        embedded = _embed(pipeline, list(zip(prompts, negatives, strict=True)), guidance > 1, batch)
        with _text_encoders_aside(pipeline):
            for start in range(0, len(prompts), batch):
                part = range(start, min(start + batch, len(prompts)))
                here, at = [prompts[i] for i in part], [seeds[i] for i in part]
                output = pipeline(
                    **embedded([(prompts[i], negatives[i]) for i in part]),
                    latents=_initial_noise(pipeline, here, at, height, width),
                    generator=[
                        torch_generator(seed, "sample-step", prompt) for prompt, seed in zip(here, at, strict=True)
                    ],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=height,
                    width=width,
                    output_type="pt",
                ).images
                images.append(output.float().cpu())
                for prompt, seed, image in zip(here, at, images[-1], strict=True):
                    if not image.isfinite().all():
                        raise LoraDpoError(
                            f"the image of prompt {prompt!r} with seed {seed} has NaN or infinite pixels;"
                            " the adapter has diverged or the VAE overflowed in float16"
                        )
                advance(len(part))
    return torch.cat(images)


def _check(pipeline, prompts, seeds, steps, guidance, height, width, batch, negative_prompts) -> None:
    if len(seeds) != len(prompts) or (negative_prompts is not None and len(negative_prompts) != len(prompts)):
        raise LoraDpoError(f"{len(prompts)} prompts need as many seeds and negative prompts, not {len(seeds)} seeds")
    multiple = max(8, pipeline.vae_scale_factor)
    for name, pixels in (("height", height), ("width", width)):
        if pixels <= 0 or pixels % multiple:
            raise UserError(f"{name} has to be a positive multiple of {multiple} pixels, got {pixels}")
    if steps < 1:
        raise UserError(f"sampling needs at least 1 step, got {steps}")
    if batch < 1:
        raise UserError(f"the sampling batch has to be at least 1 image, got {batch}")
    if not math.isfinite(guidance) or guidance < 1:
        raise UserError(f"guidance has to be 1 or more, got {guidance}", hint="1.0 switches guidance off")
    if type(pipeline.scheduler).__name__ == "DPMSolverSDEScheduler":
        # It draws one Brownian tree for the whole batch and takes no generator.
        raise UserError("DPMSolverSDEScheduler can't be seeded per image", hint="use DPMSolverMultistepScheduler")


def _initial_noise(pipeline, prompts: list[str], seeds: list[int], height: int, width: int) -> Tensor:
    """[b, c, h, w] on the pipeline's device, unit variance: the pipeline multiplies by `init_noise_sigma`."""
    factor = pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, height // factor, width // factor)
    noise = [
        torch.randn(shape, generator=torch_generator(seed, "sample", prompt))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.stack(noise).to(device=pipeline._execution_device, dtype=pipeline.unet.dtype)


def _embed(
    pipeline, keys: list[tuple[str, str | None]], guided: bool, batch: int
) -> Callable[[list[tuple[str, str | None]]], dict[str, Tensor]]:
    """Encodes every distinct (prompt, negative prompt) once; the result looks up a batch of them."""
    distinct = list(dict.fromkeys(keys))
    rows: dict[str, dict[object, Tensor]] = {}
    for start in range(0, len(distinct), batch):
        part = distinct[start : start + batch]
        negatives = [negative for _, negative in part if negative is not None]
        encoded = pipeline.encode_prompt(
            prompt=[prompt for prompt, _ in part],
            negative_prompt=negatives or None,
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        for name, tensor in zip(EMBEDDINGS, encoded, strict=False):
            if tensor is None:
                continue
            for key, row in zip(part, tensor, strict=True):
                # Negatives are mostly one and the same: stored once, as a copy that doesn't keep its batch alive.
                place = key[name.startswith("negative")]
                rows.setdefault(name, {}).setdefault(place, row.clone())

    def look_up(wanted: list[tuple[str, str | None]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([stored[key[name.startswith("negative")]] for key in wanted])
            for name, stored in rows.items()
        }

    return look_up


@contextmanager
def _job(progress: Progress | None, total: int, what: str) -> Iterator[Callable[[int], object]]:
    if progress is None:
        yield lambda n: None
        return
    progress.start(total, what)
    try:
        yield progress.advance
    finally:
        progress.stop()


@contextmanager
def _for_inference(pipeline) -> Iterator[None]:
    """Evaluation mode, no progress bar of the pipeline's own, no safety checker (it would blacken images unasked)."""
    training = [module for module in pipeline.unet.modules() if module.training]
    bar = getattr(pipeline, "_progress_bar_config", {})
    checker = getattr(pipeline, "safety_checker", None)
    try:
        pipeline.unet.eval()
        pipeline.set_progress_bar_config(**{**bar, "disable": True})
        if checker is not None:
            pipeline.safety_checker = None
        yield
    finally:
        if checker is not None:
            pipeline.safety_checker = checker
        pipeline.set_progress_bar_config(**bar)
        for module in training:
            module.training = True


@contextmanager
def _text_encoders_aside(pipeline) -> Iterator[None]:
    """Scope in which the text encoders leave the device's memory to the denoiser and the VAE: 1.5 GiB with SDXL.

    The pipeline doesn't have them meanwhile: it would take their device for its own.
    """
    # Past its __setattr__, which would take their classes out of its configuration for good.
    held = vars(pipeline)
    encoders = {name: held[name] for name in ("text_encoder", "text_encoder_2") if held.get(name) is not None}
    devices = {name: encoder.device for name, encoder in encoders.items()}
    try:
        for name, encoder in encoders.items():
            held[name] = None
            encoder.to("cpu")
        yield
    finally:
        for name, encoder in encoders.items():
            held[name] = encoder.to(devices[name])


@contextmanager
def _lora(pipeline, *, enabled: bool) -> Iterator[None]:
    """The pipeline's LoRA on or off; afterwards each layer as it was."""
    parts: list[Any] = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    layers = [m for part in parts for m in part.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    if not layers:
        raise UserError("no LoRA is loaded on the pipeline", hint="call pipeline.load_lora_weights(...) first")
    before = [layer.disable_adapters for layer in layers]
    try:
        # What disable_lora() and enable_lora() switch; those also rewrite requires_grad and refuse adapters that
        # were not loaded through diffusers.
        for layer in layers:
            layer._disable_adapters = not enabled
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
