"""A finished adapter, wherever it is: in a run's folder, a folder or a file, in diffusers' layout or in kohya's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lora_dpo import checkpoint, export, kohya_layout, updates
from lora_dpo.adapters import scale_of
from lora_dpo.errors import UserError
from lora_dpo.families import Family
from lora_dpo.run_dir import ADAPTER, RECIPE, RESULT
from lora_dpo.updates import Updates


@dataclass(frozen=True)
class Source:
    """One adapter: its updates, the file or folder they are from, and the strings of its header.

    Attributes:
        kohyas_names: the updates have the names of kohya's layout, which say little without the network.
    """

    place: Path
    updates: Updates
    header: dict[str, str]
    kohyas_names: bool = False

    def named_as_in(self, family: Family) -> Source:
        """With its updates named as the layers of the family's denoiser, which has no adapters yet.

        Raises:
            UserError: a name of kohya's layout that no layer has.
        """
        if not self.kohyas_names:
            return self
        layers_per_block = cast(Mapping[str, Any], family.denoiser.config)["layers_per_block"]
        try:
            named = kohya_layout.renamed(self.updates, family.denoiser, layers_per_block)
        except UserError as error:
            raise UserError(error.what, where=self.place, hint=error.hint) from None
        return replace(self, updates=named, kohyas_names=False)

    def origin(self) -> dict[str, str]:
        """`path` and `sha256` of the file."""
        with self.place.open("rb") as file:
            return {"path": str(self.place), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def open_source(path: Path, step: int | None = None) -> Source:
    """A run's folder (its finished adapter, or a checkpoint's), an adapter's folder or file.

    Raises:
        UserError: none of these, or `step` with anything but a run.
    """
    if (path / RECIPE).is_file():
        return _of_run(path, step)
    if step is not None:
        raise UserError("--step is for run directories", where=path, hint="give the folder with recipe.toml in it")
    file = path / export.FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            "neither a run directory nor an adapter", where=path, hint=f"an adapter is a file {export.FILE}"
        )
    return _of_file(file)


def _of_file(file: Path) -> Source:
    state, header = updates.load(file)
    try:
        if kohya_layout.is_kohyas(state):
            return Source(file, kohya_layout.read(state), header, kohyas_names=True)
        return Source(file, updates.of_unet(state, header), header)
    except UserError as error:
        raise UserError(error.what, where=file, hint=error.hint) from None


def _of_run(run: Path, step: int | None) -> Source:
    if step is None and (run / RESULT).is_file():
        return _of_file(run / ADAPTER / export.FILE)
    if step is None:
        raise UserError(
            "this run is not finished",
            where=run,
            hint="train it to its end, or export one of its checkpoints: lora-dpo export RUN --step N --out FOLDER",
        )
    saved = checkpoint.at(run, step)
    chosen = saved.identity["adapter"]
    scale = scale_of(chosen["rank"], chosen["alpha"], chosen["rslora"])
    recipe = (run / RECIPE).read_text("utf-8")
    header = {"recipe": recipe, "step": str(step), "base_unet": str(saved.identity["denoiser"])}
    return Source(saved.path, updates.from_state(saved.averaged() or saved.adapter(), scale), header)
