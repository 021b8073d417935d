"""Finished runs, and their pictures with and without the adapter."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_dpo import parts, tinyworld
from lora_dpo.errors import UserError
from lora_dpo.recipe_sections import Base
from lora_dpo.sampling import base_and_adapted, sample, to_pil

BASE_ONLY = "tiny world, base only"
ADAPTER = "run"


def finished_runs(folder: Path) -> list[str]:
    """Run directories right below `folder` that have a result, newest first."""
    found = [path for path in folder.glob("*/result.json") if path.is_file()]
    return [str(path.parent) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def result_of(run: str) -> dict[str, Any]:
    """What a run says of itself, or the same for the tiny world's base.

    Raises:
        UserError: no finished run there.
    """
    if run == BASE_ONLY:
        sampling = {"steps": 20, "guidance": 5.0, "resolution": 64}
        return {"base": str(tinyworld.base_path()), "example_prompt": "", "sampling": sampling}
    try:
        return json.loads((Path(run) / "result.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            "this is no finished run: it has no readable result.json", run, "train it to its end"
        ) from error


@dataclass
class Studio:
    """One loaded pipeline at a time, and the adapter of its run."""

    run: str | None = None
    pipeline: Any = None

    def _load(self, run: str) -> None:
        if run == self.run:
            return
        self.run, self.pipeline = None, None  # the old one's memory first
        result = result_of(run)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            pipeline = _base_of(run, device)
            if run != BASE_ONLY:
                file = Path(run) / result["adapter"]
                pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
        except (OSError, ValueError) as error:
            raise UserError(f"can't be loaded ({error})", run) from error
        self.run, self.pipeline = run, pipeline

    def pictures(
        self, run: str, prompt: str, seed: int, steps: int, guidance: float, strength: float
    ) -> tuple[Image.Image, Image.Image | None]:
        """(base, adapted) from the same noise; no adapted picture for the base alone.

        Args:
            strength: factor of the adapter's update: 0 is the base, 1 is as trained.
        """
        self._load(run)
        side = result_of(run)["sampling"]["resolution"]
        options = {"steps": steps, "guidance": guidance, "height": side, "width": side}
        if run == BASE_ONLY:
            return to_pil(sample(self.pipeline, [prompt], [seed], **options)[0]), None
        self.pipeline.set_adapters([ADAPTER], adapter_weights=[strength])
        base, adapted = base_and_adapted(self.pipeline, [prompt], [seed], **options)
        return to_pil(base[0]), to_pil(adapted[0])


def _base_of(run: str, device: str) -> Any:
    """The run's base model as its recipe names it (revision, VAE and prediction type too), in float32."""
    values: dict[str, Any] = {"family": "sdxl", "model": "tinyworld"}
    if run != BASE_ONLY:
        values = tomllib.loads((Path(run) / "recipe.toml").read_text("utf-8"))["base"]
    family = parts.open_base(Base.model_validate({**values, "dtype": "float32"}), torch.device(device))
    return family.pipeline()
