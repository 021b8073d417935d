"""One optimizer step as the published Diffusion-DPO LoRA scripts make it, to be compared with.

What diffusers' research_projects/diffusion_dpo does at every step (train_diffusion_dpo.py for SD, …_sdxl.py for SDXL):
pictures are decoded and encoded by the VAE, the prompt goes through the text encoders, then the policy's pass with
gradient checkpointing, then the reference's with peft's adapters disabled, AdamW, and four numbers for the log. It is
written here as fast as that can be written: pictures are decoded once, nothing is saved, nothing is drawn on a screen.
Two things are different by default, for a comparison of equals: adapters are float32 (the scripts leave them in
bfloat16 under bfloat16, where small updates are lost; `adapter_dtype`), and there is no flipping of pictures.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.nn import functional

Clock = Callable[[str], AbstractContextManager[Any]]
VAE_ENCODE_BATCH = 8  # the scripts' default


def share(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another network with the same weights in the same memory; `unet` must have no adapters yet."""
    with torch.device("meta"):
        other: Any = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.requires_grad_(False)


class Published:
    """The loop's state; `step` makes one optimizer step on one pair.

    Args:
        pipeline: whose VAE and text encoders are used, in their own precision.
        unet: without adapters; its own, since peft changes it.
        rows: in Pick-a-Pic's columns.
        autocast: Accelerate's mixed precision: "no" or "bf16".
        adapter_dtype: of the adapters' weights.
    """

    def __init__(
        self,
        pipeline: Any,
        unet: UNet2DConditionModel,
        rows: Sequence[Mapping[str, Any]],
        *,
        resolution: int,
        rank: int,
        targets: Sequence[str],
        beta: float,
        learning_rate: float,
        autocast: str,
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.accelerator = Accelerator(mixed_precision=autocast, cpu=device.type == "cpu")
        self.weight_dtype = torch.bfloat16 if autocast == "bf16" else torch.float32
        self.vae, self.rows, self.resolution, self.beta, self.device = pipeline.vae, rows, resolution, beta, device
        self.texts = [(pipeline.tokenizer, pipeline.text_encoder)]
        self.is_sdxl = getattr(pipeline, "text_encoder_2", None) is not None
        if self.is_sdxl:
            self.texts.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        self.schedule: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.order = random.Random(seed)
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        )
        self.parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(adapter_dtype)
        unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=1e-2, eps=1e-8)
        self.unet, self.optimizer = self.accelerator.prepare(unet, optimizer)
        self.unet.train()

    def step(self, clock: Clock = lambda _: nullcontext()) -> dict[str, float]:
        """One pair: encode, policy, reference, backward, update; the numbers for the log."""
        with clock("data"):
            row = self.order.choice(self.rows)
            pixels, size, crop = self._pixels(row)
            tokens = [self._tokens(tokenizer, row["caption"]) for tokenizer, _ in self.texts]
        with clock("VAE"), torch.no_grad():
            latents = self._latents(pixels)
        with clock("text encoders"), torch.no_grad():
            text, added = self._conditioning(tokens, size, crop)
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        t = torch.randint(0, self.schedule.config.num_train_timesteps, (1,), device=self.device).repeat(2)
        loss, logs = self.loss(latents, noise, t, text, added, clock)
        with clock("backward"):
            self.accelerator.backward(loss)
        with clock("optimizer"):
            self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss.detach().item()} | {name: value.item() for name, value in logs.items()}

    def loss(
        self,
        latents: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        added: dict[str, Tensor] | None,
        clock: Clock = lambda _: nullcontext(),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-log σ(-β/2 · (policy's gap - reference's gap)) of winners, then losers; and what the scripts log."""
        noisy = self.schedule.add_noise(latents, noise, t)
        prediction = self.schedule.config.prediction_type
        target = noise if prediction == "epsilon" else self.schedule.get_velocity(latents, noise, t)
        with clock("policy forward"):
            policy = self._errors(noisy, t, text, added, target)
        unwrapped = self.accelerator.unwrap_model(self.unet)
        with clock("reference"):
            unwrapped.disable_adapters()
            with torch.no_grad():
                reference = self._errors(noisy, t, text, added, target)
            unwrapped.enable_adapters()
        (winner, loser), (ref_winner, ref_loser) = policy.chunk(2), reference.chunk(2)
        inside = -0.5 * self.beta * ((winner - loser) - (ref_winner - ref_loser))
        accuracy = (inside > 0).sum().float() / len(inside) + 0.5 * (inside == 0).sum().float() / len(inside)
        logs = {"raw_model_loss": policy.detach().mean(), "ref_loss": reference.mean(), "implicit_acc": accuracy}
        return -functional.logsigmoid(inside).mean(), logs

    def _errors(
        self, noisy: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor] | None, target: Tensor
    ) -> Float[Tensor, " b"]:
        predicted = self.unet(noisy, t, text, added_cond_kwargs=added).sample
        return functional.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    def _pixels(self, row: Mapping[str, Any]) -> tuple[Float[Tensor, "2 3 H W"], tuple[int, int], tuple[int, int]]:
        """Winner and loser in [-1, 1], their original size (height, width) and the crop's corner (top, left)."""
        pictures = [Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1")]
        size = pictures[0].height, pictures[0].width
        if row["label_0"] == 0:
            pictures.reverse()
        scale, side = self.resolution / min(size), self.resolution
        height, width = (max(side, round(length * scale)) for length in size)
        top, left = (height - side) // 2, (width - side) // 2
        framed = []
        for picture in pictures:
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(picture.crop((left, top, left + side, top + side)))
            framed.append(torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(framed).to(self.device), size, (top, left)

    def _tokens(self, tokenizer: Any, caption: str) -> Int[Tensor, "1 n"]:
        length = tokenizer.model_max_length
        found = tokenizer([caption], truncation=True, padding="max_length", max_length=length, return_tensors="pt")
        return found.input_ids.to(self.device)

    def _latents(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        pixels = pixels.to(self.vae.dtype)
        encoded = [self.vae.encode(some).latent_dist.sample() for some in pixels.split(VAE_ENCODE_BATCH)]
        return (torch.cat(encoded) * self.vae.config.scaling_factor).to(self.weight_dtype)

    def _conditioning(
        self, tokens: Sequence[Tensor], size: tuple[int, int], crop: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n d"], dict[str, Tensor] | None]:
        if not self.is_sdxl:
            return self.texts[0][1](tokens[0])[0].repeat(2, 1, 1), None
        outputs = [
            encoder(ids, output_hidden_states=True) for (_, encoder), ids in zip(self.texts, tokens, strict=True)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        ids = torch.tensor([[*size, *crop, self.resolution, self.resolution]], dtype=self.weight_dtype)
        added = {"time_ids": ids.to(self.device).repeat(2, 1), "text_embeds": outputs[-1][0].repeat(2, 1)}
        return text.repeat(2, 1, 1), added
