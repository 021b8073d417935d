"""The commands of docs/training.md and docs/resuming.md, and what these pages say of files, numbers and messages."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import checkpoint, optimizers, parts, recipe
from lora_dpo.methods import pairs
from lora_dpo.methods.objectives import PairErrors
from lora_dpo.recipe_toml import shipped_names
from tests.support.hub_cache import keep
from tests.support.models import save_random_pairs, save_random_sdxl
from tests.support.pages import DOCS, all_messages, commands, messages, no_curves, run

SMALL = """
extends = "{name}.toml"
[data]
path = "data/pickapic_v2"
resolution = 64
heldout_fraction = 0.4
{more}
[adapter]
rank = 2
[train]
steps = {steps}
batch_pairs = 2
micro_batch_pairs = 2
save_every_steps = 2
[evaluate]
prompts = 0
scorer = "none"
implicit_pairs = 2
batch = 2
[output]
cache_dir = "cache"
"""


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# docs/training.md


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    machine = tmp_path_factory.mktemp("training")
    save_random_sdxl(machine / "made")
    save_random_pairs(machine / "data/pickapic_v2/train-0.parquet", 12)
    more = '[base]\nmodel = "made"'
    (machine / "quickstart").write_text(SMALL.format(name="quickstart", steps=2, more=more))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(machine)
        no_curves(patch)
        for words in commands("training"):
            assert run(words, machine) == 0, words
    return machine


def test_every_number_of_a_step_is_explained(trained: Path) -> None:
    text = (DOCS / "training.md").read_text("utf-8")
    table = text.split("## The numbers of a step")[1].split("Methods without a reference")[0]
    explained = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    first, last = lines(trained / "runs/best")
    assert set(last) == explained
    assert {name for name in last if name.startswith("heldout_")} == set(last) - set(first)


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("objectives/")])
def test_the_numbers_of_every_objective_are_explained(name: str) -> None:
    text = (DOCS / "training.md").read_text("utf-8").split("## The numbers of a step")[1].split("\n## ")[0]
    explained = {each for row in re.findall(r"^\| (`.*?) \|", text, re.M) for each in re.findall(r"`(\w+)`", row)}
    objective = parts.objective(recipe.load(name).method)
    sides = ("winner", "loser") if "loser" in objective.needs else ("winner",)
    measured = [*sides]
    measured += [f"ref_{side}" for side in sides if "reference" in objective.needs]
    measured += [f"shift_{side}" for side in sides if "shift" in objective.needs]
    measured += ["overlap"] if "overlap" in objective.needs else []
    errors = PairErrors(
        t=torch.tensor([5, 9]), weight=torch.ones(2), label=torch.ones(2), **{each: torch.rand(2) for each in measured}
    )
    logged = pairs._sums(objective, errors, objective(errors))
    assert {"loss", "error_winner"} <= set(logged) <= explained


def test_a_fresh_adapters_numbers_are_those_that_are_called_healthy(trained: Path) -> None:
    for name in ("quickstart", "best", "beta-500", "beta-4000"):
        first = lines(trained / "runs" / name)[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
        assert (first["margin"], first["implicit_accuracy"], first["gradient_factor"]) == (0, 0.5, 0.5)
        assert first["error_winner"] == first["ref_error_winner"]


def test_runs_of_one_seed_see_the_same_draws(trained: Path) -> None:
    """What the page says of sweeps."""
    one, other = (lines(trained / "runs" / name) for name in ("beta-500", "beta-4000"))
    assert [line["ref_error_loser"] for line in one] == [line["ref_error_loser"] for line in other]
    assert one[1]["margin"] != other[1]["margin"]


def test_every_optimizer_is_explained() -> None:
    text = (DOCS / "training.md").read_text("utf-8").split("## Optimizers")[1].split("\n## ")[0]
    for kind in optimizers.Kind.__args__:
        assert f"`{kind}`" in text


# docs/resuming.md


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The page's commands in order, the first of them killed in its fourth step; and a run that nothing happened to."""
    machine = tmp_path_factory.mktemp("resuming")
    base = save_random_sdxl(machine / "made")
    keep(machine / "hub", "stabilityai/stable-diffusion-xl-base-1.0", base)
    keep(machine / "hub", "madebyollin/sdxl-vae-fp16-fix", base / "vae")
    save_random_pairs(machine / "data/pickapic_v2/train-0.parquet", 12)
    (machine / "sdxl_lora").write_text(SMALL.format(name="sdxl_lora", steps=6, more="bucket_step_pixels = 16"))
    interrupted, changed, fresh = commands("resuming")
    real, made = optimizers.build, []

    def dying(*args, **kwargs):
        optimizer = real(*args, **kwargs)
        step = optimizer.step

        def counted(*more, **options):
            made.append(1)
            if len(made) == 4:
                raise Killed
            return step(*more, **options)

        optimizer.step = counted
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(machine)
        no_curves(patch)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(machine / "hub"))
        patch.setattr(optimizers, "build", dying)
        with pytest.raises(Killed):
            run(interrupted, machine)
        patch.setattr(optimizers, "build", real)
        shutil.copytree(machine / "runs/sdxl", machine / "runs/killed")
        assert run(changed, machine) == 0
        shutil.copytree(machine / "runs/sdxl", machine / "runs/finished")
        assert run(fresh, machine) == 0
    return machine


def test_the_killed_run_has_what_the_page_says(resumed: Path) -> None:
    killed = resumed / "runs/killed"
    assert [line["step"] for line in lines(killed)] == [1, 2, 3]
    assert checkpoint.steps(killed) == [2]
    files = {path.name for path in (killed / "checkpoints/step-00000002").iterdir()}
    assert files == {"adapter.safetensors", "optimizer.safetensors", "state.json"}
    state = json.loads((killed / "checkpoints/step-00000002/state.json").read_text())
    assert {"step", "identity", "versions", "files"} <= set(state)


def test_with_other_free_keys_it_ends_as_if_nothing_had_happened(resumed: Path) -> None:
    """`--fresh` made the same run once more, without an interruption."""
    again, uninterrupted = resumed / "runs/finished", resumed / "runs/sdxl"
    one, two = (load_file(path / "adapter/pytorch_lora_weights.safetensors") for path in (again, uninterrupted))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line["step"] for line in lines(again)] == [1, 2, 3, 4, 5, 6]


def test_fresh_puts_the_old_run_aside(resumed: Path) -> None:
    before, aside = resumed / "runs/finished", resumed / "runs/sdxl.old-1"
    assert (aside / "metrics.jsonl").read_bytes() == (before / "metrics.jsonl").read_bytes()
    assert (aside / "result.json").is_file()


def test_the_keys_that_may_change_are_those_of_the_program() -> None:
    from lora_dpo.recipe_sections import FREE_KEYS

    text = (DOCS / "resuming.md").read_text("utf-8").split("## What may change")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w.]+)`", text))
    others = {"train.steps", "train.schedule", "adapter.start", "data", "denoiser", "vae", "text_encoders"}
    assert named - others == FREE_KEYS


@pytest.mark.parametrize("message", messages("resuming"))
def test_the_messages_it_explains_are_those_of_the_program(message: str) -> None:
    assert message in all_messages()
