"""What the originals of SD 1.x, SD 2.x and SDXL are: which tensors of a checkpoint belong where, and their settings.

The settings are those of the folders that stability.ai and runwayml published for diffusers, without their weights;
`transformers` and `diffusers` fill in the defaults. A checkpoint of another size needs its own (`base.config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_dpo.families.clip import END, MAX_TOKENS

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
PNDM: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    **BETAS,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
DDIM: dict[str, Any] = {"_class_name": "DDIMScheduler", **BETAS, "set_alpha_to_one": False, "clip_sample": False}
EULER: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "leading"}


@dataclass(frozen=True)
class Original:
    """One layout of single-file checkpoints.

    Attributes:
        marks: tensors that every such file has and that no earlier layout of `ORIGINALS` has.
        prefixes: component → the beginning of its tensors' names.
        pad_tokens: tokenizer → what pads its texts.
        prediction_type: of every such model, unless the file says otherwise; None: it can't be told.
        index: as model_index.json.
        configs: component → settings.
    """

    title: str
    marks: tuple[str, ...]
    prefixes: dict[str, str]
    pad_tokens: dict[str, str]
    prediction_type: str | None
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]] = field(repr=False)


def _text(hidden: int, layers: int, heads: int, act: str, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": act,
        "projection_dim": projection,
        # Not the tokenizer's: with 2, transformers finds the end of the text as these models were trained.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _vae(size: int, scaling: float, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": size,
        "scaling_factor": scaling,
        **more,
    }


SDXL = Original(
    title="SDXL",
    marks=("conditioner.embedders.1.model.ln_final.weight", "conditioner.embedders.0.transformer."),
    prefixes={
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    pad_tokens={"tokenizer": END, "tokenizer_2": "!"},
    prediction_type="epsilon",
    index={
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    },
    configs={
        "unet": {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _vae(1024, 0.13025, force_upcast=True),
        "text_encoder": _text(768, 12, 12, "quick_gelu", 768),
        "text_encoder_2": _text(1280, 32, 20, "gelu", 1280),
        "scheduler": EULER,
    },
)
SD2 = Original(
    title="Stable Diffusion 2.x",
    marks=("cond_stage_model.model.ln_final.weight",),
    prefixes={"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    pad_tokens={"tokenizer": "!"},
    prediction_type=None,
    index={"_class_name": "StableDiffusionPipeline"},
    configs={
        "unet": {
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": _vae(512, 0.18215),
        # The file has 24 layers; the model uses the output of the last but one.
        "text_encoder": _text(1024, 23, 16, "gelu", 512),
        "scheduler": DDIM,
    },
)
SD1 = Original(
    title="Stable Diffusion 1.x",
    marks=("cond_stage_model.transformer.",),
    prefixes={"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    pad_tokens={"tokenizer": END},
    prediction_type="epsilon",
    index={"_class_name": "StableDiffusionPipeline"},
    configs={
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _vae(512, 0.18215),
        "text_encoder": _text(768, 12, 12, "quick_gelu", 768),
        "scheduler": PNDM,
    },
)
ORIGINALS = (SDXL, SD2, SD1)
# (a part of a tensor's name, what the file then is): models and files that are often mistaken for a base model.
OTHERS = (
    ("conditioner.embedders.0.model.", "the SDXL refiner, which is no base model"),
    ("double_blocks.", "a Flux model"),
    ("joint_blocks.", "an SD3 model"),
    ("lora_unet_", "a LoRA in kohya's layout: give the model that it was trained for"),
    (".lora_A.", "a LoRA in diffusers' layout: give the model that it was trained for"),
    (".lora_down.", "a LoRA: give the model that it was trained for"),
    ("encoder.down.0.", "a VAE alone: it can be named as base.vae"),
    ("down_blocks.0.", "one component in diffusers' layout: give the pipeline's whole folder"),
)
