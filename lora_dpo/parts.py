"""What a recipe names, made: one `match` per choice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

from lora_dpo import __version__, cache, optimizers, recipe_methods, sources, tinyworld
from lora_dpo import recipe as recipes
from lora_dpo.adapters import Adapters
from lora_dpo.cache_store import digest
from lora_dpo.data import PreferenceSource
from lora_dpo.data.framing import Framing
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.fake_device import FakeDevice
from lora_dpo.families import Family
from lora_dpo.families.files import ModelFiles
from lora_dpo.families.hollow import Hollow, Settings, find_settings
from lora_dpo.file_digests import default_cache_dir
from lora_dpo.methods import Method, losses, objectives
from lora_dpo.methods.pairs import PairMethod, reference_composition
from lora_dpo.methods.stream import PairStream
from lora_dpo.recipe import Recipe
from lora_dpo.recipe_checks import SINGLE_FILE
from lora_dpo.recipe_sections import Base
from lora_dpo.recompute import recompute
from lora_dpo.reference_cache import ReferenceErrors
from lora_dpo.scorers import Scorer
from lora_dpo.sources import Source
from lora_dpo.start import start_from
from lora_dpo.trackers import Trackers


def identity(recipe: Recipe, family: Family, start: dict[str, str] | None = None) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it share: the recipe where it matters, and the bytes behind.

    All of it but the pairs that the data turn out to hold; no network is loaded.

    Args:
        start: `origin` of the adapter that training starts from.
    """
    values = recipe.model_dump(mode="json", include={"adapter", "method", "train"})
    values["adapter"]["start"] = start["sha256"] if start is not None else None
    for key in recipes.FREE_KEYS:
        section, _, name = key.partition(".")
        values.get(section, {}).pop(name, None)
    if recipes.resumes("train.steps", recipe):
        del values["train"]["steps"]
    made_of = family.fingerprint()
    return values | {
        "data": source(recipe, recipe.data.split).fingerprint(),
        "caption_dropout": recipe.data.caption_dropout,
        "denoiser": made_of["unet"],
        "vae": made_of["vae"],
        "text_encoders": made_of["text_encoders"],
        "dtype": recipe.base.dtype,
        "quantization": recipe.base.quantization,
        "prediction_type": family.schedule.prediction_type,
    }


def device(name: str) -> torch.device:
    if name != "auto":
        kind = name.partition(":")[0]
        available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
        if not available[kind]():
            raise UserError(f"there is no {kind} device here", where="train.device", hint='give "auto" or "cpu"')
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def family(recipe: Recipe, device: torch.device) -> Family:
    return open_base(recipe.base, device)


def open_base(chosen: Base, device: torch.device, files: ModelFiles | None = None) -> Family:
    """The family of a base; `files`: its files, opened, in place of those that the recipe names."""
    folder = tinyworld.base_path() if chosen.model == recipes.TINYWORLD else chosen.model
    of_files: set[str] = {"revision", "vae", "config", "prediction_type"} if files is None else set()
    options = chosen.model_dump(include=of_files | {"dtype", "quantization"})
    match chosen.family:
        case "sdxl":
            from lora_dpo.families.sdxl import SDXL

            return SDXL(files or folder, device=device, **options)
        case "stable_diffusion":
            from lora_dpo.families.stable_diffusion import StableDiffusion

            return StableDiffusion(files or folder, device=device, **options)


def base(recipe: Recipe) -> Path | str:
    return tinyworld.base_path() if recipe.base.model == recipes.TINYWORLD else recipe.base.model


def base_options(recipe: Recipe) -> dict[str, Any]:
    """What else whoever loads the base model has to know, as far as the recipe says it."""
    chosen = recipe.base.model_dump(include={"revision", "prediction_type"}, exclude_none=True)
    return chosen | ({"single_file": True} if recipe.base.model.endswith(SINGLE_FILE) else {})


def hollow_family(recipe: Recipe, fake: FakeDevice) -> tuple[Family, list[str]]:
    """The family on a fake device, without weights; and what was taken for granted about the base."""
    settings, notes = _settings(recipe)
    return open_base(recipe.base, fake.device, Hollow(settings, fake)), notes


def family_here(recipe: Recipe) -> Family | None:
    """The family, if all of its files are on this machine; nothing is fetched."""
    settings, notes = _settings(recipe)
    if notes or not isinstance(settings, ModelFiles):
        return None
    return open_base(recipe.base, torch.device("cpu"), settings)


def _settings(recipe: Recipe) -> tuple[Settings, list[str]]:
    given = recipe.base.model_dump(include={"revision", "vae", "config", "prediction_type"})
    return find_settings(base(recipe), family=recipe.base.family, **given)


def source(recipe: Recipe, split: str, limit: int | None = None) -> PreferenceSource:
    data = recipe.data
    path = tinyworld.preferences_path() if data.path == recipes.TINYWORLD else Path(data.path)
    ties = data.ties if split == data.split else "drop"  # the evaluation asks which image is the better one
    options: dict[str, Any] = {
        "split": split,
        "heldout_split": data.heldout_split,
        "heldout_fraction": data.heldout_fraction,
        "seed": recipe.train.seed,
        "limit": limit or data.limit,
        "ties": ties,
    }
    match data.kind:
        case "pickapic":
            from lora_dpo.data.pickapic import PickAPicParquet

            return PickAPicParquet(path, columns=data.columns, **options)
        case "folder":
            from lora_dpo.data.folder import open_folder

            return open_folder(path, **options)
        case "hpdv2":
            from lora_dpo.data.hpdv2 import Rankings

            return Rankings(path, pairs=data.pairs_of_ranking, **options)


def source_at(kind: Literal["pickapic", "folder", "hpdv2"], path: Path) -> PreferenceSource:
    """All rows at a path, without a recipe."""
    match kind:
        case "pickapic":
            from lora_dpo.data.pickapic import PickAPicParquet

            return PickAPicParquet(path)
        case "folder":
            from lora_dpo.data.folder import open_folder

            return open_folder(path)
        case "hpdv2":
            from lora_dpo.data.hpdv2 import Rankings

            return Rankings(path)


def framing(recipe: Recipe) -> Framing:
    data = recipe.data
    return Framing(
        data.resolution,
        aspect=data.aspect,
        bucket_step=data.bucket_step_pixels,
        max_aspect=data.max_aspect,
        crop=data.crop,
        small_images=data.small_images,
    )


def start(recipe: Recipe) -> Source | None:
    """The adapter that training starts from, if the recipe names one.

    Raises:
        UserError: it can't be read, or is no LoRA of a UNet.
    """
    return sources.open_source(Path(recipe.adapter.start)) if recipe.adapter.start is not None else None


def start_origin(recipe: Recipe) -> dict[str, str] | None:
    """Its `origin`; what it holds, twice as large as the adapter, is not kept. UserError as `start`."""
    found = start(recipe)
    return found.origin() if found is not None else None


def adapters(recipe: Recipe, family: Family, start: Source | None, tell: Callable[[str], None]) -> Adapters:
    """On the family's denoiser, from their random start or from `start`, which may be the reference then.

    Raises:
        UserError: as `fresh_adapters`; a start that doesn't fit the recipe or the base.
    """
    begun = start.named_as_in(family) if start is not None else None
    made = fresh_adapters(recipe, family)
    if begun is not None:
        missing = start_from(made, begun.updates, begun.place)
        tell(_begun(begun, len(made.layers), missing, family))
        if reference(recipe) == "adapter":
            made.keep_as_reference()
    return made


def fresh_adapters(recipe: Recipe, family: Family) -> Adapters:
    """On the family's denoiser, from their random start; it computes as many activations again as the recipe says.

    Raises:
        UserError: targets that no layer has; too many blocks.
    """
    policy = recipe.train.gradient_checkpointing
    if policy == "auto":
        raise LoraDpoError("how many blocks are computed again has to be settled before")
    recompute(family.denoiser, policy)
    return Adapters.attach(
        family.denoiser,
        seed=recipe.train.seed,
        **recipe.adapter.model_dump(include={"rank", "alpha", "targets", "dropout", "rslora", "dora"}),
    )


def optimizer(recipe: Recipe, adapters: Adapters) -> torch.optim.Optimizer:
    chosen = recipe.train
    return optimizers.build(
        chosen.optimizer,
        adapters.parameters(),
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
    )


def _begun(start: Source, layers: int, missing: int, family: Family) -> str:
    text = f"training starts from {start.place}"
    if missing:
        text += f"; {missing} of {layers} layers are not in it, and start as the base"
    base = start.header.get("base_unet")
    if base is not None and base != family.fingerprint()["unet"]:
        text += "; it was trained on other weights than this base's"
    return text


def reference(recipe: Recipe) -> Literal["base", "adapter"]:
    """What the policy is compared with; methods without a reference of their own are measured against the base."""
    return recipe.method.reference if isinstance(recipe.method, recipe_methods.Compared) else "base"


def method(recipe: Recipe, pairs: cache.CachedPairs, family: Family, adapters: Adapters) -> Method:
    chosen = recipe.method
    stream = PairStream(
        pairs,
        family,
        seed=recipe.train.seed,
        batch_pairs=recipe.train.batch_pairs,
        visits_per_pair=chosen.visits_per_pair or 0,
        caption_dropout=recipe.data.caption_dropout,
        timestep_range=chosen.timestep_range,
        independent_images=isinstance(chosen, recipe_methods.Kto),
        timestep_sampling=chosen.timestep_sampling,
    )
    weights = _timestep_weights(chosen, family) if isinstance(chosen, recipe_methods.OfMargin) else None
    made = objective(chosen, family.schedule.num_timesteps)
    way = recipe.train.pair_pass
    references = None
    if isinstance(chosen, recipe_methods.OfErrors) and chosen.reference_cache:
        kept_by = reference_identity(recipe, stream, adapters, reference_composition(made, way))
        references = ReferenceErrors(cache_dir(recipe), kept_by, pairs.keys)
    return PairMethod(stream, family, adapters, made, timestep_weights=weights, pair_pass=way, references=references)


def reference_identity(recipe: Recipe, stream: PairStream, adapters: Adapters, composition: str) -> dict[str, Any]:
    """What the reference's error of a pair's visit depends on; not the objective, its β, or the number of visits."""
    family = stream.family
    on_gpu = family.device.type == "cuda"
    weights = {name: weight.detach().cpu().numpy().tobytes() for name, weight in adapters.reference_weights().items()}
    return {
        "reference": digest(adapters.scale, *itertools.chain(*weights.items())) if weights else "base",
        "denoiser": family.fingerprint()["unet"],
        "dtype": recipe.base.dtype,
        "quantization": recipe.base.quantization,
        "precision": recipe.train.precision,
        "prediction_type": family.schedule.prediction_type,
        "schedule": digest(family.schedule.alphas_cumprod.cpu().numpy().tobytes()),
        "error_space": "epsilon",
        "pairs": stream.pairs.fingerprint,
        **stream.draws,
        # Of these, rounding alone.
        "composition": composition,
        "device": torch.cuda.get_device_name(family.device) if on_gpu else family.device.type,
        "torch": torch.__version__,
    }


def objective(chosen: recipe_methods.Method, timesteps: int = 1000) -> objectives.Objective:
    """What is learned; `timesteps` is T of the base's schedule."""
    match chosen:
        case recipe_methods.Dpo():
            return objectives.Dpo(**_values(chosen, objectives.Dpo))
        case recipe_methods.Ipo():
            return objectives.Ipo(**_values(chosen, objectives.Ipo))
        case recipe_methods.Hinge():
            return objectives.Hinge(**_values(chosen, objectives.Hinge))
        case recipe_methods.Dmpo():
            return objectives.Dmpo(**_values(chosen, objectives.Dmpo))
        case recipe_methods.Kto():
            return objectives.Kto(**_values(chosen, objectives.Kto))
        case recipe_methods.Mapo():
            return objectives.Mapo(**_values(chosen, objectives.Mapo), timesteps=timesteps)
        case recipe_methods.Dspo():
            return objectives.Dspo(**_values(chosen, objectives.Dspo))
        case recipe_methods.Sft():
            return objectives.Sft()


def _values(chosen: recipe_methods.Method, kind: Any) -> dict[str, Any]:
    values = chosen.model_dump(include={field.name for field in fields(kind)})
    if values.get("beta") == "auto":
        values |= {"auto": True, "beta": losses.auto_beta(0.0)}
    return values


def _timestep_weights(chosen: recipe_methods.OfMargin, family: Family) -> torch.Tensor | None:
    if chosen.timestep_weight == "constant":
        return None
    gamma = chosen.min_snr_gamma or losses.MIN_SNR_GAMMA
    weights = losses.timestep_weights(family.schedule.alphas_cumprod, chosen.timestep_weight, gamma=gamma)
    low, high = chosen.timestep_range or (0, len(weights))
    return weights / weights[low:high].mean()


def fixed_beta(chosen: recipe_methods.Method) -> float | None:
    """β of the implicit reward, where the method has one and it doesn't change."""
    beta = getattr(chosen, "beta", None)
    return beta if isinstance(beta, float) else None


def scorer(recipe: Recipe) -> Scorer | None:
    match recipe.evaluate.scorer:
        case "tinyworld":
            from lora_dpo.scorers.tinyworld import TinyWorldScorer

            return TinyWorldScorer()
        case "none":
            return None


def cache_dir(recipe: Recipe) -> Path:
    if recipe.output.cache_dir is not None:
        return Path(recipe.output.cache_dir)
    return default_cache_dir()


def trackers(recipe: Recipe, run_dir: Path, tell: Callable[[str], None]) -> Trackers:
    return Trackers(
        recipe.output.trackers,
        run_dir=run_dir,
        project=recipe.output.tracker_project,
        name=recipe.name,
        config=recipe.model_dump(mode="json"),
        tell=tell,
    )


def metadata(recipe: Recipe, family: Family, start: dict[str, str] | None = None) -> dict[str, str]:
    begun = {"start_sha256": start["sha256"]} if start is not None else {}
    return begun | {
        "lora_dpo_version": __version__,
        "base_model": recipe.base.model,
        "base_unet": family.fingerprint()["unet"],
        "method": json.dumps(recipe.method.model_dump(mode="json")),
        "rank": str(recipe.adapter.rank),
        "alpha": str(recipe.adapter.alpha),
        "rslora": str(recipe.adapter.rslora),
        "dora": str(recipe.adapter.dora),
        "reference": reference(recipe),
        "recipe": recipes.dump(recipe),
    }
