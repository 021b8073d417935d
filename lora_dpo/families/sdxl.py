"""Stable Diffusion XL: two text encoders, and the picture's size and crop as conditioning [SDXL, sec. 2.2]."""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import StableDiffusionXLPipeline
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_dpo.errors import LoraDpoError
from lora_dpo.families import Conditioning
from lora_dpo.families.unet import UNetFamily


@final
class SDXL(UNetFamily):
    """Conditioning: `prompt_embeds` [b, tokens, d1 + d2], `pooled` [b, p] and, with geometry, `time_ids` [b, 6]."""

    name = "sdxl"
    components = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    @property
    def _zeros_for_empty(self) -> bool:
        return bool(self.folder.index.get("force_zeros_for_empty_prompt", True))

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        hidden, pooled = [], None
        for tokenizer, encoder in self._encoders():
            with torch.no_grad():
                output = encoder(self._tokens(tokenizer, prompts)["input_ids"], output_hidden_states=True)
            # The last layer but one, without the final norm; the pooled text is the second encoder's.
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        conditioning = {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled": pooled}
        empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
        if self._zeros_for_empty and empty.any():
            for tensor in conditioning.values():
                tensor[empty] = 0
        return conditioning

    def with_geometry(self, conditioning: Conditioning, geometry: Int[Tensor, "b 6"]) -> Conditioning:
        # In float32: bfloat16 has no 1001, and the network embeds these numbers in float32 anyway.
        return {**conditioning, "time_ids": geometry.to(conditioning["pooled"].device, torch.float32)}

    def predict(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        if "time_ids" not in conditioning:
            raise LoraDpoError("SDXL predicts from sizes and crops too: pass the conditioning through with_geometry")
        text, pooled = (conditioning[name].to(x_t.device, self.dtype) for name in ("prompt_embeds", "pooled"))
        added = {"text_embeds": pooled, "time_ids": conditioning["time_ids"].to(x_t.device)}
        return self.denoiser(
            x_t.to(self.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]

    def pipeline(self) -> StableDiffusionXLPipeline:
        (tokenizer, encoder), (tokenizer_2, encoder_2) = self._encoders()
        return self._finished(
            StableDiffusionXLPipeline(
                vae=self._autoencoder(),
                text_encoder=encoder,
                text_encoder_2=encoder_2,
                tokenizer=tokenizer,
                tokenizer_2=tokenizer_2,
                unet=self.denoiser,
                scheduler=self.folder.scheduler(),
                force_zeros_for_empty_prompt=self._zeros_for_empty,
                add_watermarker=False,
            )
        )

    def _load_texts(self) -> list[tuple[CLIPTokenizer, Any]]:
        first = self.folder.text_encoder(CLIPTextModel, "text_encoder", self.dtype, self.device)
        second = self.folder.text_encoder(CLIPTextModelWithProjection, "text_encoder_2", self.dtype, self.device)
        return [(self.folder.tokenizer("tokenizer"), first), (self.folder.tokenizer("tokenizer_2"), second)]
