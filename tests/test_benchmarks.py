"""Benchmarks that take long: what they ask of the recipes has to be something that these can do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lora_dpo import recipe
from tests.support.models import save_random_pairs

ROOT = Path(__file__).parents[1]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_the_true_size_runs_recipe(tmp_path: Path, kind: str) -> None:
    true_size = benchmark("true_size")
    (tmp_path / "base" / "vae").mkdir(parents=True)
    save_random_pairs(tmp_path / "pairs.parquet", 2)
    loaded = recipe.load(true_size.RECIPES[kind], true_size.overrides(kind, tmp_path, 512, 4, 1))
    assert loaded.train.steps == loaded.evaluate.every_steps == 4
