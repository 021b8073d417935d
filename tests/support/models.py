"""Random weights in the true formats: diffusers pipeline folders and Pick-a-Pic parquet, made in a second, offline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 16
ACTS = {1: "quick_gelu", 2: "gelu"}  # OpenAI's CLIP and OpenCLIP
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token, so any text can be encoded."""
    alphabet = sorted(ByteLevel.alphabet())
    names = alphabet + [f"{character}</w>" for character in alphabet] + [START, END]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=MAX_TOKENS)


def text_config(words: CLIPTokenizer, *, projection: int, act: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def autoencoder(*, levels: int, scaling_factor: float) -> AutoencoderKL:
    """Downscales by 2 ** (levels - 1)."""
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def save_random_sdxl(path: Path | str, *, seed: int = 0) -> Path:
    """A StableDiffusionXLPipeline folder: 64×64 pixels, 4×16×16 latents, float32 safetensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tokenizer(), tokenizer(pad_token="!")
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 1),
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(levels=3, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config(first, projection=16)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(second, projection=16)),
            tokenizer=first,
            tokenizer_2=second,
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="leading",
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipeline.save_pretrained(path, safe_serialization=True)
    return Path(path)


def save_random_sd(path: Path | str, *, prediction_type: str = "epsilon", version: int = 1, seed: int = 0) -> Path:
    """A StableDiffusionPipeline folder: 64×64 pixels, 4×8×8 latents, float32 safetensors; of SD 1.x or 2.x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer() if version == 1 else tokenizer(pad_token="!")
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            use_linear_projection=version == 2,
        )
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        scheduler = (
            DDIMScheduler(**betas, prediction_type=prediction_type, set_alpha_to_one=False, clip_sample=False)
            if prediction_type == "v_prediction"
            else PNDMScheduler(**betas, prediction_type=prediction_type, skip_prk_steps=True, set_alpha_to_one=False)
        )
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(levels=4, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(text_config(words, projection=16, act=ACTS[version])),
            tokenizer=words,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(path, safe_serialization=True)
    return Path(path)


def png(rng: np.random.Generator, size: int | tuple[int, int]) -> bytes:
    """One picture of (height, width): a coloured disc on a coloured ground."""
    height, width = (size, size) if isinstance(size, int) else size
    ground, ink = rng.integers(0, 256, (2, 3))
    y, x = np.mgrid[:height, :width]
    distance = (y - rng.uniform(0.3, 0.7) * height) ** 2 + (x - rng.uniform(0.3, 0.7) * width) ** 2
    buffer = io.BytesIO()
    disc = distance < (0.25 * min(height, width)) ** 2
    Image.fromarray(np.where(disc[..., None], ink, ground).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


Shape = tuple[int, int]


def save_random_pairs(
    path: Path | str,
    n: int,
    *,
    size: int = 64,
    seed: int = 0,
    ties: int = 0,
    shapes: Sequence[tuple[Shape, Shape]] | None = None,
) -> Path:
    """`n` rows in Pick-a-Pic's columns, `ties` of them undecided; about two rows share a caption.

    Args:
        shapes: (height, width) of the rows' two pictures, over and over, in place of squares.
    """
    rng = np.random.default_rng(seed)
    undecided = set(rng.permutation(n)[:ties].tolist())
    nouns, colours = ("circle", "square", "star", "ring"), ("red", "blue", "green", "pink", "grey")
    rows = []
    for index in range(n):
        caption = f"a {colours[index // 2 % 5]} {nouns[index // 10 % 4]} no {index // 2}"
        label_0 = 0.5 if index in undecided else float(rng.integers(0, 2))
        one, other = shapes[index % len(shapes)] if shapes else (size, size)
        rows.append(
            {
                "jpg_0": png(rng, one),
                "jpg_1": png(rng, other),
                "label_0": label_0,
                "label_1": 1.0 - label_0,
                "caption": caption,
                "are_different": True,
                "has_label": True,
                "image_0_uid": f"image-{seed}-{index}-0",
                "image_1_uid": f"image-{seed}-{index}-1",
                "model_0": "random",
                "model_1": "random",
                "user_id": index % 3,
                "ranking_id": index,
            }
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    return Path(path)
