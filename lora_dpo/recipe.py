"""The recipe: every choice of a run as frozen, strict models, read from TOML.

Every problem is reported at once, with file and line, before any heavy import. `build.py` and `cli.py` alone see
these models; everything below takes plain arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_dpo import recipe_toml
from lora_dpo.recipe_checks import TINYWORLD, contradictions, may_be_hub_id
from lora_dpo.recipe_errors import Problem, RecipeError, shown, translate
from lora_dpo.recipe_toml import Document, Key

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Preference pairs and how pictures become training pixels."""

    kind: Literal["pickapic", "folder"] = Field(
        default="pickapic", description="parquet in Pick-a-Pic's columns, or JSONL"
    )
    path: Text = Field(description='"tinyworld" for the embedded pairs, else a file or folder')
    columns: dict[str, str] = Field(default={}, description="pickapic: our name → your column's name")
    split: Text = Field(default="train", description="rows to train on, where the source has a split")
    heldout_split: Text = Field(
        default="heldout", description="rows kept for the evaluation, where the source has a split"
    )
    heldout_fraction: Fraction = Field(
        default=0.05, description="share of prompts held out, where the source has no split"
    )
    resolution: Annotated[int, Field(gt=0, multiple_of=8)] = Field(description="pixels, height and width")
    caption_dropout: Fraction = Field(default=0.0, description="share of draws trained with the empty prompt")
    limit: Positive | None = Field(default=None, description="use at most so many pairs")


class Base(Section):
    """The model to be aligned; it is also the reference."""

    family: Literal["sdxl", "stable_diffusion"]
    model: Text = Field(description='"tinyworld", a diffusers folder, or a hub id')
    revision: Text | None = Field(default=None, description="hub revision: a branch, tag or commit")
    vae: Text | None = Field(default=None, description="another VAE: folder or hub id")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the frozen weights")


class Adapter(Section):
    """LoRA on the denoiser; its weights are float32 always."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="the update is scaled by alpha / rank")
    targets: (
        Literal["attention", "attention+ff", "all-linear"]
        | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    ) = Field(default="attention", description="a preset, or an array of module name endings")
    dropout: Fraction = 0.0


class Draws(Section):
    timestep_range: Annotated[tuple[Count, Positive], Field(strict=False)] | None = Field(
        default=None, description="[low, high]: timesteps are uniform in low … high − 1; default: all"
    )
    visits_per_pair: Positive | None = Field(default=None, description="bounds the distinct (t, ε) draws of a pair")


class Dpo(Draws):
    """Diffusion-DPO (Wallace et al. 2023, eq. 14)."""

    kind: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = Field(
        default=2000.0, description="β·T of the paper; errors are means over c, h, w"
    )


class Sft(Draws):
    """Supervised fine-tuning on the winners."""

    kind: Literal["sft"]


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
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = Field(default=0, description="linear; a run shorter than it ends in it")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(default=1.0, description="0: no clipping")
    save_every_steps: Positive = 100
    keep_checkpoints: Positive = 2
    gradient_checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: torch's autocast")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"


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


class Output(Section):
    """Where things go; relative to the working directory."""

    run_dir: Text | None = Field(default=None, description="default: runs/<name>")
    cache_dir: Text | None = Field(default=None, description="encoded pairs; default: <user cache>/lora-dpo")
    hub_repo: Text | None = Field(default=None, description="push the adapter here when done")


class Recipe(Section):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    data: Data
    base: Base
    adapter: Adapter = Adapter()
    method: Annotated[Dpo | Sft, Field(discriminator="kind")]
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()


_SECTIONS: dict[str, type[Section]] = {
    "data": Data, "base": Base, "adapter": Adapter, "train": Train, "evaluate": Evaluate, "output": Output
}  # fmt: skip
_METHODS: dict[str, type[Section]] = {"dpo": Dpo, "sft": Sft}
KINDS = {"method": {kind: frozenset(model.model_fields) for kind, model in _METHODS.items()}}
# Keys whose change leaves what is learned the same, up to rounding; a run may be resumed with others.
FREE_KEYS = frozenset(
    {
        "name",
        "train.device",
        "train.save_every_steps",
        "train.keep_checkpoints",
        "train.micro_batch_pairs",
        "train.gradient_checkpointing",
    }
)


def load(name: str, arguments: Sequence[str] = ()) -> Recipe:
    """A recipe by path or shipped name, with `section.key=value` arguments over it.

    Raises:
        UserError: no such recipe, malformed TOML, an argument that is not an override.
        RecipeError: everything wrong with keys and values, at once.
    """
    path = recipe_toml.find(name)
    document = recipe_toml.inherit(path, KINDS)
    document.values.setdefault("name", path.stem)
    if arguments:
        document = recipe_toml.merge(document, recipe_toml.overrides(arguments), KINDS)
    document.name = str(path)
    return validate(document)


def validate(document: Document) -> Recipe:
    """The recipe of a document; relative input paths are taken from the file that sets them, and made absolute.

    Raises:
        RecipeError: everything wrong with keys and values, at once.
    """
    values = _with_absolute_inputs(document)
    problems: dict[Key, str] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            key, message = _translated(entry, values)
            problems.setdefault(key, message)
    problems = dict(contradictions(values, set(problems), _default)) | problems
    if problems or recipe is None:
        order = {key: n for n, key in enumerate(document.places)}
        keys = sorted(problems, key=lambda k: order.get(k, len(order)))
        raise RecipeError(document.name, [Problem(k, problems[k], document.place(k)) for k in keys])
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` of it gives an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`section.key` of everything that differs, `output` and `FREE_KEYS` left out."""
    one, two = old.model_dump(), new.model_dump()
    found = []
    for section in one:
        if section == "output" or section in FREE_KEYS:
            continue
        here, there = one[section], two[section]
        found += [f"{section}.{key}" for key in here | there if here.get(key) != there.get(key)]
    return [key for key in found if key not in FREE_KEYS]


def json_schema() -> dict[str, Any]:
    """JSON schema for editors; `extends` is part of the file, not of the resolved recipe."""
    schema = Recipe.model_json_schema()
    schema["title"] = "lora-dpo recipe"
    schema["properties"]["extends"] = {"type": "string", "description": "a recipe file or shipped name to start from"}
    # A file that extends another, or is completed on the command line, may leave out anything.
    for table in (schema, *schema["$defs"].values()):
        table.pop("required", None)
    schema["properties"]["method"] = {"anyOf": schema["properties"]["method"]["oneOf"]}
    return schema


def _with_absolute_inputs(document: Document) -> dict[str, Any]:
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in document.values.items()}
    for section, name in _INPUTS:
        table = values.get(section)
        value = table.get(name) if isinstance(table, dict) else None
        place = document.place((section, name))
        if not isinstance(table, dict) or not isinstance(value, str) or value == TINYWORLD or not value:
            continue
        folder = place.file.resolve().parent if place is not None and place.file is not None else Path.cwd()
        path = folder / Path(value).expanduser()
        if path.exists() or not (section == "base" and may_be_hub_id(value)):
            table[name] = str(path)
    return values


_INPUTS = (("data", "path"), ("base", "model"), ("base", "vae"), ("evaluate", "prompts_file"))


def _default(section: str, name: str, kind: object) -> Any:
    """The default of a key, of its section's `kind` where that matters; KeyError if there is none."""
    model = _METHODS[str(kind)] if section == "method" else _SECTIONS[section]
    field = model.model_fields[name]
    if field.is_required():
        raise KeyError(name)
    return field.default


def _translated(entry: Any, values: dict[str, Any]) -> tuple[Key, str]:
    loc = list(entry["loc"])
    if loc[0] == "method" and len(loc) > 1 and loc[1] in _METHODS:
        del loc[1]  # pydantic's mark of the union's branch
    if loc[0] == "adapter" and len(loc) > 2:
        loc = loc[:2]
        return tuple(loc), _TARGETS.format(shown(values["adapter"]["targets"]))
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        loc.append("kind")
    kind = values["method"].get("kind") if isinstance(values.get("method"), dict) else None
    method = _METHODS.get(kind) if isinstance(kind, str) else None
    known = {(section,): list(model.model_fields) for section, model in _SECTIONS.items()}
    known |= {(): [*Recipe.model_fields, "extends"], ("method",): list((method or Dpo).model_fields)}
    if entry["type"] == "extra_forbidden" and loc[0] == "method" and method and len(loc) == 2:
        others = [k for k, model in _METHODS.items() if loc[1] in model.model_fields]
        if others:
            return tuple(loc), f'method.kind = "{kind}" has no {loc[1]} (it belongs to {", ".join(others)})'
    about = {
        (section, name): field.description
        for section, model in _SECTIONS.items()
        for name, field in model.model_fields.items()
        if field.description
    }
    return translate({**entry, "loc": loc}, known, about)


_TARGETS = 'got {}, expected "attention", "attention+ff", "all-linear" or an array of module name endings'
