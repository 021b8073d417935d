"""`lora-dpo export`: adapters that are finished into other files: resized, averaged, of another step, merged."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lora_dpo import atomic, export, kohya, parts, updates
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Family, uncropped
from lora_dpo.families.files import quiet
from lora_dpo.families.unet import DTYPES
from lora_dpo.randomness import torch_generator
from lora_dpo.recipe_sections import Base
from lora_dpo.run_dir import KOHYA
from lora_dpo.sources import Source, open_source
from lora_dpo.updates import Updates

PROBE = "re-export verification"


def base_of(sources: Sequence[Source], model: str | None, family: str | None, dtype: str | None) -> Base:
    """The base model that the adapters belong to: as their header's recipe has it, unless other values are given.

    Raises:
        UserError: adapters of different base models, or no way to tell which.
    """
    known = {source.header["base_unet"] for source in sources if "base_unet" in source.header}
    if len(known) > 1:
        places = ", ".join(str(source.place) for source in sources)
        raise UserError("these adapters were trained on different base models", where=places)
    values: dict[str, Any] = {}
    for source in reversed(sources):
        values |= tomllib.loads(source.header.get("recipe", "")).get("base", {})
    # What belongs to the recipe's own model doesn't go with another.
    values = {"family": values.get("family"), "model": model} if model is not None else values
    values |= {key: value for key, value in (("family", family), ("dtype", dtype)) if value is not None}
    try:
        return Base.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        missing = ", ".join(str(entry["loc"][0]) for entry in error.errors())
        raise UserError(
            f"the adapter doesn't say what its base model is ({missing})",
            where=sources[0].place,
            hint="give --base and --family (sdxl or stable_diffusion)",
        ) from None


def run(
    places: Sequence[Path],
    out: Path,
    *,
    step: int | None = None,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    merge: bool = False,
    base: str | None = None,
    family: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    verify: bool = True,
    device: str = "auto",
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The command: see `write_adapter` and `write_merged`, which its result is from.

    Raises:
        UserError: as these, and options that don't go together.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", where="--dtype", hint=f"one of {', '.join(DTYPES)}")
    if merge and (rank is not None or name is not None):
        raise UserError("a merged model has no rank and no second file", where="--merge", hint="leave it out")
    sources = [open_source(place, step) for place in places]
    chosen = base_of(sources, base, family, dtype if merge else None)
    if merge:
        chosen = chosen.model_copy(update={"quantization": "none"})  # into the weights, not into their codes
    where = parts.device(device)
    opened = parts.open_base(chosen, where)
    sources = [source.named_as_in(opened) for source in sources]
    if merge:
        # The written folder has its own VAE and its own prediction type: nothing but the place is replaced.
        again = Base(family=chosen.family, model=str(out), dtype=chosen.dtype)
        return write_merged(
            sources,
            opened,
            lambda folder: parts.open_base(again.model_copy(update={"model": str(folder)}), where),
            out,
            weights=weights,
            verify=verify,
            tell=tell,
        )
    return write_adapter(
        sources,
        opened,
        out,
        name=name or out.resolve().name,
        weights=weights,
        rank=rank,
        dtype=dtype or "float32",
        verify=verify,
        tell=tell,
    )


def write_adapter(
    sources: Sequence[Source],
    family: Family,
    out: Path,
    *,
    name: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    verify: bool = True,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Both files of one adapter into the folder `out`, from one source or the weighted mean of several.

    Args:
        weights: of the sources; None: equal, with sum 1.
        rank: the largest that a layer may have; None: the largest among the sources.
        dtype: of the files' tensors.
        verify: reload both files through stock diffusers, and compare predictions.

    Raises:
        UserError: sources that don't fit each other or the base; `out` has an adapter already.
        LoraDpoError: a reloaded file predicts something else.
    """
    files = [out / export.FILE, out / KOHYA / f"{name}.safetensors"]
    for file in files:
        if file.exists():
            raise UserError("there is a file already", where=file, hint="give another --out")
    shares = _shares(sources, weights)
    whole = updates.average([source.updates for source in sources], shares)
    limit = rank or max(update.rank for source in sources for update in source.updates.values())
    resized = None
    if any(update.rank > limit for update in whole.values()):
        resized = updates.resize(whole, limit)
        what = "update (its magnitudes apart)" if updates.is_dora(whole) else "update"
        tell(f"rank {limit}: {resized.error:.2%} of the {what} is lost, {resized.worst[1]:.2%} in {resized.worst[0]}")
    kept = resized.updates if resized else whole
    state = updates.to_state(kept, DTYPES[dtype])
    result: dict[str, Any] = {
        "adapter": str(files[0]),
        "adapter_kohya": None,
        "sources": [str(source.place) for source in sources],
        "weights": shares,
        "rank": max(update.rank for update in kept.values()),
        "dtype": dtype,
        "error": resized.error if resized else 0.0,
        "worst_layer": list(resized.worst) if resized else None,
        "verification": None,
        "resizing_effect": None,
    }
    header = {key: value for key, value in sources[0].header.items() if not key.startswith(("ss_", "modelspec."))}
    header |= {"lora_dpo_export": json.dumps({key: result[key] for key in ("sources", "weights", "rank", "error")})}
    try:
        export.write({f"{export.PREFIX}.{key}": tensor for key, tensor in state.items()}, files[0], header)
        try:
            alpha = float(result["rank"])
            result["adapter_kohya"] = str(
                kohya.save(state, alpha, family, files[1], header | {"rank": str(result["rank"])})
            )
        except kohya.NotInKohyasLayout as error:
            tell(f"no file in kohya's layout: {error}")
        if verify:
            result |= _verify(family, whole, state, files, result, tell)
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    return result


@torch.no_grad()
def _verify(
    family: Family, whole: Updates, state: dict[str, Any], files: list[Path], result: dict[str, Any], tell: Any
) -> dict[str, Any]:
    """Against the updates added by hand to the layers' outputs, for the file has no trained adapter beside it."""
    inputs = probe(family)
    base = export.predict(family, inputs)
    with updates.applied(family.denoiser, updates.from_state({key: t.float() for key, t in state.items()})):
        wanted = export.predict(family, inputs)
    with updates.applied(family.denoiser, whole):
        before = export.predict(family, inputs)
    verified = export.verify_file(family, files[0], inputs, policy=wanted, base=base)
    tell(f"{files[0]} is verified: stock diffusers predicts the same to {verified.difference:.1e}")
    second = None
    if result["adapter_kohya"] is not None:
        second = kohya.keep_if_same(family, files[1], inputs, tell)
    found: dict[str, Any] = {
        "adapter_kohya": str(second) if second else None,
        "verification": {"difference": verified.difference, "tolerance": verified.tolerance, "effect": verified.effect},
    }
    if result["worst_layer"] is not None:
        changed = ((wanted - before).square().mean() / (before - base).square().mean()).sqrt().item()
        tell(f"predictions moved by {changed:.2%} of what the adapter changes")
        found["resizing_effect"] = changed
    return found


def write_merged(
    sources: Sequence[Source],
    family: Family,
    reopen: Callable[[Path], Family],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    verify: bool = True,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """A whole diffusers pipeline with the update in its UNet's weights, in the folder `out`.

    Args:
        reopen: the family of a folder, to verify what was written.

    Raises:
        UserError: `out` exists and isn't empty; sources that don't fit the base; disk full.
        LoraDpoError: the reloaded pipeline predicts something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("there is something already", where=out, hint="give a new or an empty folder as --out")
    shares = _shares(sources, weights)
    whole = updates.average([source.updates for source in sources], shares)
    inputs = probe(family)
    with torch.no_grad():
        base = export.predict(family, inputs)
        with updates.applied(family.denoiser, whole):
            wanted = export.predict(family, inputs)
    updates.merge(family.denoiser, whole)
    staging = out.with_name(f".{out.name}.partial")
    with atomic.clear_os_errors(out):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            with export.errors_only(), quiet():
                family.pipeline().save_pretrained(staging)
            family.release()
            found = None
            if verify:
                found = _verify_merged(reopen(staging), inputs, wanted, base, out, tell)
            if out.exists():
                out.rmdir()
            os.rename(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return {
        "pipeline": str(out),
        "sources": [str(source.place) for source in sources],
        "weights": shares,
        "dtype": str(family.dtype).removeprefix("torch."),
        "verification": found,
    }


@torch.no_grad()
def _verify_merged(
    family: Family, inputs: export.Probe, wanted: torch.Tensor, base: torch.Tensor, out: Path, tell: Any
) -> dict[str, float]:
    merged = export.predict(family, inputs)
    tolerance = export.tolerance_for(family, wanted)
    difference, effect = ((wanted - other).abs().max().item() for other in (merged, base))
    if not difference <= tolerance:
        raise LoraDpoError(
            f"{out}: the merged model's predictions differ from the adapter's by {difference:.3g} (tolerance "
            f"{tolerance:.3g}; the adapter itself changes them by {effect:.3g}); nothing was kept"
        )
    tell(f"{out} is verified: reloaded, it predicts the same to {difference:.1e}; the adapter changes {effect:.1e}")
    return {"difference": difference, "tolerance": tolerance, "effect": effect}


def probe(family: Family, seed: int = 0) -> export.Probe:
    """Noise at two timesteps, under the prompts "" and "a photo", at half the model's resolution to take less time."""
    side = family.resolution // 2
    shape = (2, family.latent_channels, side // family.latent_scale, side // family.latent_scale)
    x_t = torch.randn(shape, generator=torch_generator(seed, PROBE)).to(family.device)
    steps = family.schedule.num_timesteps
    conditioning = family.with_geometry(family.encode_prompts(["", "a photo"]), uncropped(side, side, 2))
    return export.Probe(x_t, torch.tensor([steps // 4, steps // 2], device=family.device), conditioning)


def _shares(sources: Sequence[Source], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1 / len(sources)] * len(sources)
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} adapters", where="--weights")
    return [float(weight) for weight in weights]
