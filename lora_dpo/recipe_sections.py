"""The sections of a recipe as frozen, strict models: every key, its values and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_dpo.recipe_errors import shown
from lora_dpo.recipe_fields import Count, Fraction, Positive, Section, Text
from lora_dpo.recipe_methods import METHODS, Method


class Data(Section):
    """Preference pairs and how pictures become training pixels."""

    kind: Literal["pickapic", "folder", "hpdv2"] = Field(
        default="pickapic",
        description="parquet in Pick-a-Pic's columns, a folder of pictures, or rankings in HPDv2's JSON",
    )
    path: Text = Field(description='"tinyworld" for the embedded pairs, else a file or folder')
    columns: dict[str, str] = Field(default={}, description="pickapic: our name → your column's name")
    pairs_of_ranking: Literal["all", "adjacent", "best_worst"] = Field(
        default="all", description="hpdv2: every pair of a ranking, neighbours only, or the first with the last"
    )
    split: Text = Field(default="train", description="rows to train on, where the source has a split")
    heldout_split: Text = Field(
        default="heldout", description="rows kept for the evaluation, where the source has a split"
    )
    heldout_fraction: Fraction = Field(
        default=0.05, description="share of prompts held out, where the source has no split"
    )
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = Field(description="pixels; the side of the square")
    aspect: Literal["square", "buckets"] = Field(
        default="square", description="buckets: a pair gets the size that is nearest to its pictures' shape"
    )
    bucket_step_pixels: Annotated[int, Field(gt=0, multiple_of=8)] = Field(
        default=64, description="buckets: sides are multiples of it"
    )
    max_aspect: Annotated[float, Field(ge=1)] = Field(default=2.0, description="buckets: long side over short side")
    crop: Literal["center", "top"] = Field(default="center", description="the part of a picture that is kept")
    small_images: Literal["enlarge", "drop"] = Field(
        default="enlarge", description="pictures smaller than their size: enlarge them, or drop the pair"
    )
    caption_dropout: Fraction = Field(default=0.0, description="share of draws trained with the empty prompt")
    limit: Positive | None = Field(default=None, description="use at most so many pairs")
    on_bad_image: Literal["skip", "error"] = Field(
        default="skip", description="error: end the run if a picture is missing or can't be decoded, once all were read"
    )
    ties: Literal["drop", "half"] = Field(
        default="drop", description="half: train on ties too, as pairs of which either may be the better"
    )


class Base(Section):
    """The model to be aligned; it is also the reference."""

    family: Literal["sdxl", "stable_diffusion"]
    model: Text = Field(description='"tinyworld", a diffusers folder, a hub id, or a .safetensors checkpoint')
    revision: Text | None = Field(default=None, description="hub revision: a branch, tag or commit")
    vae: Text | None = Field(default=None, description="another VAE: folder, hub id, or .safetensors file")
    config: Text | None = Field(
        default=None, description="for a single file: a diffusers folder or hub id with its settings and tokenizers"
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        default=None, description="what the model predicts, where its files don't say so; it overrides them"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the frozen weights")
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none", description="of the denoiser's large linear layers, by bitsandbytes: less memory, more time"
    )


class Adapter(Section):
    """LoRA on the denoiser; its weights are float32 always."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="the update is scaled by alpha / rank")
    targets: (
        Literal["attention", "attention+ff", "all-linear", "attention+conv", "attention+ff+conv", "all-linear+conv"]
        | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    ) = Field(default="attention", description="a preset, or an array of module name endings and re:patterns")
    dropout: Fraction = 0.0
    rslora: bool = Field(default=False, description="scale by alpha / √rank instead")
    dora: bool = Field(default=False, description="learn the length of each output's weights too")
    start: Text | None = Field(default=None, description="an adapter to start from: a run's folder, a folder or a file")


class Train(Section):
    """The optimizer's steps."""

    seed: Count = 0
    steps: Positive = 1000
    batch_pairs: Positive = Field(default=32, description="pairs per optimizer step")
    micro_batch_pairs: Positive | None = Field(
        default=None, description="pairs per pass; divides batch_pairs; default: all"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=1e-4, description="as the optimizer sees it, never rescaled"
    )
    optimizer: Literal[
        "adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "schedule_free_adamw"
    ] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = Field(default=0, description="linear; a run shorter than it ends in it")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0: no clipping")
    ema_decay: Fraction | None = Field(
        default=None,
        description="average the adapter's weights, and evaluate and export the average; 0.99 for instance",
    )
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        default=2.0, description="go back when the winners' error is this many times the reference's; 0: never"
    )
    save_every_steps: Positive = 100
    keep_checkpoints: Positive = 2
    gradient_checkpointing: Literal["none", "full", "auto"] | Positive = Field(
        default="none",
        description="compute activations again: none, of all blocks (full), of so many, or of as few as fit (auto)",
    )
    memory_budget_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="auto: GiB that training may take; default: what is free on the CUDA device"
    )
    pair_pass: Literal["plain", "split"] = Field(
        default="plain", description="split: one image at a time, with half of a pair's activations"
    )
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: torch's autocast")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _in_these_words(cls, value: object) -> object:
        if value in ("none", "full", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        now = {True: ' ("full" is what true was)', False: ' ("none" is what false was)'}
        said = now[value] if isinstance(value, bool) else ""
        raise ValueError(f'got {shown(value)}, expected "none", "full", "auto" or a number of blocks{said}')


class Evaluate(Section):
    """Base and adapted model on held-out prompts, from the same seeds."""

    prompts: Count = Field(default=64, description="held-out prompts to sample; 0: no samples")
    seeds_per_prompt: Positive = 1
    steps: Positive = Field(default=20, description="sampler steps")
    guidance: Annotated[float, Field(ge=1)] = Field(default=5.0, description="classifier-free guidance; 1: none")
    batch: Positive = Field(default=16, description="pictures per sampler call")
    scorer: Literal["tinyworld", "none"] = "none"
    prompts_file: Text | None = Field(
        default=None, description="one prompt a line, instead of the held-out pairs' prompts"
    )
    seed: Count = Field(default=0, description="of the initial noise")
    implicit_pairs: Count = Field(default=256, description="held-out pairs for the implicit accuracy; 0: none")
    every_steps: Positive | None = Field(default=None, description="measure it during training too, so often")
    every_steps_pairs: Positive = Field(default=32, description="on so many of these pairs, always the same")
    checkpoint: Literal["last", "best"] = Field(
        default="last", description="best: export the step with the highest implicit accuracy on them"
    )


class Output(Section):
    """Where things go; relative to the working directory."""

    run_dir: Text | None = Field(default=None, description="default: runs/<name>")
    cache_dir: Text | None = Field(default=None, description="encoded pairs; default: <user cache>/lora-dpo")
    hub_repo: Text | None = Field(default=None, description="push the adapter here when done")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        default=[], description="send the metrics there too"
    )
    tracker_project: Text = Field(default="lora-dpo", description="what the trackers call the project or experiment")


class Recipe(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    data: Data
    base: Base
    adapter: Adapter = Adapter()
    method: Annotated[Method, Field(discriminator="kind")]
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()


SECTIONS: dict[str, type[Section]] = {
    "data": Data, "base": Base, "adapter": Adapter, "train": Train, "evaluate": Evaluate, "output": Output
}  # fmt: skip
KINDS = {"method": {kind: frozenset(model.model_fields) for kind, model in METHODS.items()}}
# Keys whose change leaves what is learned the same, up to rounding; a run may be resumed with others.
FREE_KEYS = frozenset(
    {
        "name",
        "data.on_bad_image",
        "train.device",
        "train.save_every_steps",
        "train.keep_checkpoints",
        "train.micro_batch_pairs",
        "train.gradient_checkpointing",
        "train.memory_budget_gb",
        "train.pair_pass",
        "method.reference_cache",
    }
)
# Keys that name files; what a run is learned from is told by their content, wherever they lie.
CONTENT_KEYS = frozenset({"data.path", "base.model", "base.revision", "base.vae", "base.config", "adapter.start"})
