"""Every base model of the paper, from a folder and from one file: a run ends with an adapter that stock diffusers uses.

The adapters are loaded by diffusers alone, from both layouts, onto the base as its user has it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from lora_dpo import build, recipe
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl
from tests.support.pages import no_curves
from tests.support.single_file import save_single_file

RECIPE = """
[data]
path = "pairs.parquet"
resolution = 64
[base]
family = "{family}"
[adapter]
rank = 2
alpha = 6
[method]
kind = "dpo"
[train]
steps = 2
batch_pairs = 2
learning_rate = 1e-2
[evaluate]
prompts = 0
implicit_pairs = 0
[output]
cache_dir = "{cache}"
"""
BASES = {
    "sd15": (save_random_sd, {}),
    "sd21-base": (save_random_sd, {"version": 2}),
    "sd21": (save_random_sd, {"version": 2, "prediction_type": "v_prediction"}),
    "sdxl": (save_random_sdxl, {}),
}
PREDICTS = {"sd21-base": "epsilon", "sd21": "v_prediction"}


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory) -> Path:
    """A folder named as the base model, with it in `model/` and `model.safetensors`, and its settings alone."""
    folder = tmp_path_factory.mktemp("bases") / request.param
    save, options = BASES[request.param]
    save(folder / "model", **options)
    save_single_file(folder / "model", folder / "model.safetensors")
    shutil.copytree(folder / "model", folder / "settings", ignore=shutil.ignore_patterns("*.safetensors", "scheduler"))
    save_random_pairs(folder / "pairs.parquet", 4)
    family = "sdxl" if request.param == "sdxl" else "stable_diffusion"
    (folder / "small.toml").write_text(RECIPE.format(family=family, cache=folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def runs(base: Path) -> dict[str, Path]:
    """The run directory of each form of the base model."""
    overrides = {"folder": [f"base.model={base / 'model'}"]}
    overrides["file"] = [f"base.model={base / 'model.safetensors'}", f"base.config={base / 'settings'}"]
    if base.name in PREDICTS:  # a folder says it itself
        overrides["file"].append(f"base.prediction_type={PREDICTS[base.name]}")
    with pytest.MonkeyPatch.context() as patch:
        no_curves(patch)
        for form, chosen in overrides.items():
            build.run(recipe.load(str(base / "small.toml"), chosen), base / form, quiet=True)
    return {form: base / form for form in overrides}


def test_both_forms_teach_the_same(runs: dict[str, Path]) -> None:
    """The same weights in another format are the same run: the adapters are equal, bit for bit."""
    for file in ("adapter/pytorch_lora_weights.safetensors", "kohya/small.safetensors"):
        one, two = (load_file(run / file) for run in runs.values())
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_adapters_work_elsewhere(base: Path, runs: dict[str, Path]) -> None:
    kind = StableDiffusionXLPipeline if base.name == "sdxl" else StableDiffusionPipeline
    stock = kind.from_pretrained(base / "model", local_files_only=True)
    stock.set_progress_bar_config(disable=True)

    def picture() -> torch.Tensor:
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
        return stock("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    without = picture()
    for run in runs.values():
        found = json.loads((run / "result.json").read_text())["verification"]
        assert found["effect"] > 100 * found["difference"]
        adapted = []
        for layout in ("adapter", "kohya"):
            stock.load_lora_weights(run / layout, local_files_only=True)
            adapted.append(picture())
            stock.unload_lora_weights()
        torch.testing.assert_close(*adapted, rtol=0, atol=1e-4)
        assert (adapted[0] - without).abs().max() > 1e-3
