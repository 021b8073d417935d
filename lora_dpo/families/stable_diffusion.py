"""Stable Diffusion 1.x and 2.x: one CLIP text encoder; ε- or v-prediction."""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lora_dpo.families import Conditioning
from lora_dpo.families.unet import UNetFamily


@final
class StableDiffusion(UNetFamily):
    """Conditioning: `prompt_embeds` [b, tokens, d]."""

    name = "stable_diffusion"
    components = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    text_components = ("text_encoder", "tokenizer")

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        ((tokenizer, encoder),) = self._encoders()
        tokens = self._tokens(tokenizer, prompts)
        masked = getattr(encoder.config, "use_attention_mask", False)
        with torch.no_grad():
            hidden = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"] if masked else None)
        return {"prompt_embeds": hidden.last_hidden_state}

    def with_geometry(self, conditioning: Conditioning, geometry: Int[Tensor, "b 6"]) -> Conditioning:
        return conditioning

    def predict(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        context = conditioning["prompt_embeds"].to(x_t.device, self.dtype)
        return self.denoiser(x_t.to(self.dtype), t, encoder_hidden_states=context, return_dict=False)[0]

    def pipeline(self) -> StableDiffusionPipeline:
        ((tokenizer, encoder),) = self._encoders()
        absent: Any = None
        return self._finished(
            StableDiffusionPipeline(
                vae=self._autoencoder(),
                text_encoder=encoder,
                tokenizer=tokenizer,
                unet=self.denoiser,
                scheduler=self.folder.scheduler(),
                safety_checker=absent,
                feature_extractor=absent,
                requires_safety_checker=False,
            )
        )

    def _load_texts(self) -> list[tuple[CLIPTokenizer, Any]]:
        encoder = self.folder.text_encoder(CLIPTextModel, "text_encoder", self.dtype, self.device)
        return [(self.folder.tokenizer("tokenizer"), encoder)]
