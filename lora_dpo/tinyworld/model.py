"""The tiny world's model: the parts of a `StableDiffusionXLPipeline`, each small."""

# diffusers and transformers annotate these arguments more narrowly than they take them.
# pyright: reportArgumentType=false

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .scenes import SIZE, WORDS

MAX_TOKENS = 16  # start, at most 13 words, end
TEXT_WIDTH = 96
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token; anything else falls apart into letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # earlier words' merges come first, so that a later word can't break an earlier one
        pieces = _apply([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary.append(pieces[0])
    vocabulary.extend(SPECIAL)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
        return CLIPTokenizer(
            vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_TOKENS,
            bos_token=SPECIAL[0], eos_token=SPECIAL[1], unk_token=SPECIAL[1], pad_token=SPECIAL[1],
        )  # fmt: skip


def _apply(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: the earliest merge that fits is made first, until none fits."""
    while fits := [(merges.index(p), i) for i, p in enumerate(itertools.pairwise(pieces)) if p in merges]:
        _, i = min(fits)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def autoencoder() -> AutoencoderKL:
    """64×64 pixels ⇄ 16×16 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8, mid_block_add_attention=False, sample_size=SIZE, scaling_factor=1.0, force_upcast=False,
    )  # fmt: skip


def denoiser() -> UNet2DConditionModel:
    """SDXL's layout in small: attention only at the lower resolutions, size and pooled-text conditioning."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, block_out_channels=(48, 96, 160), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(3, 3, 5), cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + TEXT_WIDTH, use_linear_projection=True, norm_num_groups=16,
    )  # fmt: skip


def text_encoders(words: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two text encoders of one size; the second has the projection that gives the pooled embedding."""
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH, hidden_act="quick_gelu",
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


def scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule; DPM-Solver++ needs few steps, which is what a CPU has."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="epsilon", algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing",
        use_karras_sigmas=False,
    )  # fmt: skip


def encode_text(
    words: CLIPTokenizer, encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings [b, tokens, 2·width] and pooled embedding [b, width], as the SDXL pipeline makes them."""
    ids = words(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids.to(encoders[0].device)
    first = encoders[0](ids, output_hidden_states=True)
    second = encoders[1](ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def pipeline(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    words: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """The stock pipeline around the parts."""
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=words, tokenizer_2=words,
        unet=unet, scheduler=scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
