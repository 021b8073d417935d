"""benchmarks/memory.py: the plan beside what a step takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lora_dpo.fitting import with_changes

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("step_modes", "published", "true_size")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_memory", BENCHMARKS / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_plan_is_what_tensors_hold_in_the_steps_of_training(benchmark, tmp_path) -> None:
    """A real `Step` on the tiny world, real pairs from the cache, and the optimizer's state from a step before."""
    recipe = benchmark.load_recipe("tinyworld", tmp_path, 2, None)
    changed = with_changes(recipe, benchmark.SETTINGS["split, checkpointing"])
    found = benchmark.measure_step(changed, torch.device("cpu"), tmp_path)
    assert abs(found["error_to_counted_percent"]) < 0.5
    assert found["planned_parts_gib"].keys() >= {"weights", "adapter", "optimizer", "activations"}
    for part in ("weights", "adapter", "optimizer"):
        assert found["planned_parts_gib"][part] == found["counted_parts_gib"][part]
    row = benchmark.table({"split": found}).splitlines()[1].split()
    assert [row[0], float(row[1]), float(row[3])] == [
        "split", round(found["planned_gib"], 3), round(found["error_to_counted_percent"], 2)
    ]  # fmt: skip


def test_the_vae_on_a_batch_takes_what_was_planned(benchmark, tmp_path) -> None:
    recipe = benchmark.load_recipe("tinyworld", tmp_path, 2, None)
    found = benchmark.measure_encoding(recipe, torch.device("cpu"))
    assert abs(found["error_to_counted_percent"]) < 0.5
    assert found["phase"] == "encode images"
