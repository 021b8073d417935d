"""The recipes that come with the package, as their users meet them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from lora_dpo import cli, memory, recipe, recipe_toml

NAMES = recipe_toml.shipped_names()
LARGE = [name for name in NAMES if name.startswith("sd")]  # whose reader brings the data
SMALLER = [name for name in NAMES if re.search(r"_\d+gb$", name)]
DATA = "data.path=."


@pytest.mark.parametrize("name", NAMES)
def test_check_passes(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", name, *([DATA] if name in LARGE else []), "--json"])
    assert caught.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    assert document["recipe"]["name"] == name.rpartition("/")[2]


@pytest.mark.parametrize("name", LARGE)
def test_it_begins_with_what_it_is_for_and_the_command(name: str) -> None:
    first, second = recipe_toml.find(name).read_text("utf-8").splitlines()[:2]
    assert first.startswith("# Diffusion-DPO on ")
    assert second == f"#   lora-dpo train {name} data.path=/data/pickapic_v2"


@pytest.mark.parametrize("name", ["sd15_lora", "sdxl_lora"])
def test_every_choice_says_why(name: str) -> None:
    """Each key has a comment beside or below it, but for names and for those that are said once above."""
    lines = recipe_toml.find(name).read_text("utf-8").splitlines()
    bare = {
        line.split(" = ")[0]
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if re.match(r"\w+ = ", line) and "#" not in line and not following.lstrip().startswith("#")
    }
    assert bare <= {"kind", "family", "save_every_steps", "gradient_checkpointing", "steps", "batch"}


@pytest.mark.parametrize("name", SMALLER)
def test_a_name_with_a_cards_memory_is_of_a_recipe_that_it_extends(name: str) -> None:
    file = recipe_toml.find(name)
    stem, _, size = name.rpartition("_")
    assert f"one card of {size.removesuffix('gb')} GB" in file.read_text("utf-8").splitlines()[0]
    assert tomllib.loads(file.read_text("utf-8"))["extends"].startswith(stem)


def test_what_the_smaller_cards_learn_otherwise(tmp_path: Path) -> None:
    """Their headers say so: on 12 GB nothing, on 8 GB the rounding of the base."""
    large, *small = (recipe.load(name, [DATA]) for name in ("sdxl_lora", "sdxl_lora_12gb", "sdxl_lora_8gb"))
    (held := tmp_path / "large.toml").write_text(recipe.dump(large), "utf-8")
    differing = [list(recipe.differences(held, one)) for one in small]
    assert differing == [["evaluate.batch"], ["base.quantization", "evaluate.batch"]]
    assert {one.train.micro_batch_pairs for one in small} == {1}
    assert {one.train.gradient_checkpointing for one in small} == {"full"}


def test_what_each_base_predicts_at_which_size() -> None:
    loaded = {name: recipe.load(name, [DATA]) for name in LARGE}
    assert {name: one.data.resolution for name, one in loaded.items() if name not in SMALLER} == {
        "sd15_lora": 512, "sd21_lora": 768, "sd21_base_lora": 512, "sdxl_lora": 1024
    }  # fmt: skip
    assert {one.base.family for name, one in loaded.items() if name.startswith("sdxl")} == {"sdxl"}
    assert {one.base.family for name, one in loaded.items() if name.startswith("sd1")} == {"stable_diffusion"}
    # What the models' folders say about ε and v is heeded.
    assert all(one.base.prediction_type is None for one in loaded.values())


def memory_in_the_header(name: str) -> dict[str, float]:
    """GiB by phase."""
    text = recipe_toml.find(name).read_text("utf-8")
    return {
        phase: float(value)
        for phase, value in re.findall(r"^#   (encoding|training|samples)\b.* {2,}(\d+\.\d)$", text, re.M)
    }


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("sdxl_lora", ["training"]),
        ("sdxl_lora_8gb", ["encoding", "training", "samples"]),
        ("sd15_lora", ["encoding", "training", "samples"]),
        ("sd21_lora", ["training"]),
    ],
)
def test_the_memory_that_a_header_names_is_the_plans(name: str, phases: list[str]) -> None:
    """Within 2 %. Not of every recipe and phase: SDXL's take seconds each."""
    of = {"encoding": memory.ENCODING, "training": memory.TRAINING, "samples": memory.EVALUATION}
    among = [phase for one in phases for phase in of[one]]
    found = memory.estimate(recipe.load(name, [DATA]), "cuda", among)
    written = memory_in_the_header(name)
    for one in phases:
        assert written[one] == pytest.approx(found.phases[found.highest(of[one])].total / memory.GIB, rel=0.02), one
    card = re.search(r"card of (\d+) GB", recipe_toml.find(name).read_text("utf-8"))
    if card is not None:
        assert found.needed() < int(card[1]) * memory.GIB


@pytest.mark.parametrize("name", LARGE)
def test_a_bases_page_names_the_same_memory(name: str) -> None:
    written = memory_in_the_header(name)
    assert set(written) == {"encoding", "training", "samples"}
    page, column = {
        "sdxl_lora": ("sdxl", -3), "sdxl_lora_12gb": ("sdxl", -2), "sdxl_lora_8gb": ("sdxl", -1),
        "sd15_lora": ("sd15", -1), "sd21_lora": ("sd21", -2), "sd21_base_lora": ("sd21", -1),
    }[name]  # fmt: skip
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text("utf-8")
    table = text.split("<!-- memory -->")[1].split("<!-- /memory -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {row[0]: float(row[column]) for row in rows} == written
