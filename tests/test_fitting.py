"""The nearest settings that fit: traced, not guessed, as large as they can be, and in words that can be copied."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, fitting, memory, plan, recipe, step
from lora_dpo.errors import UserError
from lora_dpo.fake_device import Kind
from lora_dpo.fitting import fewest_recomputed, nearest
from lora_dpo.memory import DECODING, EVALUATION, TRAINING, Estimate
from lora_dpo.plan_table import text
from lora_dpo.run_dir import RECOMPUTED
from lora_dpo.step import accumulate
from tests.support.live_memory import LiveMemory
from tests.support.models import save_random_pairs, save_random_sd
from tests.test_memory import BASE


@cache
def traced(written: str, device: Kind, among: tuple[str, ...]) -> Estimate:
    return REAL(recipe.Recipe.model_validate_json(written), device, among)


REAL = memory.estimate


def estimate(chosen: recipe.Recipe, device: Kind = "cuda", among: Collection[str] = memory.PHASES) -> Estimate:
    """The real one, once for each recipe."""
    return traced(chosen.model_dump_json(), device, tuple(among))


@pytest.fixture(autouse=True)
def _once(monkeypatch) -> None:
    monkeypatch.setattr(memory, "estimate", estimate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def load(folder):
    def loaded(*overrides: str) -> recipe.Recipe:
        base = ["base.family=stable_diffusion", f"base.model={folder}", f"base.vae={folder / 'vae'}"]
        return recipe.load("sdxl_lora", [*base, *BASE, "evaluate.batch=2", *overrides])

    return loaded


def training(chosen: recipe.Recipe) -> int:
    return estimate(chosen, "cpu", TRAINING).needed()


def test_as_few_blocks_are_computed_again_as_fit(load) -> None:
    full, plain = (training(load(f"train.gradient_checkpointing={policy}")) for policy in ("full", "none"))
    assert fewest_recomputed(load(), plain, "cpu") == ("none", plain)
    assert fewest_recomputed(load(), full - 1, "cpu") is None
    room = (full + plain) // 2
    found = fewest_recomputed(load(), room, "cpu")
    assert found is not None
    count, needed = found
    assert isinstance(count, int)
    assert needed == training(load(f"train.gradient_checkpointing={count}")) <= room
    blocks = estimate(load(), "cpu", TRAINING).blocks
    fewer = count - -(-blocks // 2**fitting.HALVINGS)
    assert training(load(f"train.gradient_checkpointing={fewer or 'none'}")) > room


def test_fewer_pairs_a_pass_come_first_as_many_as_fit(load) -> None:
    room = training(load("train.micro_batch_pairs=2"))
    chosen = load("train.micro_batch_pairs=4", "evaluate.prompts=0")
    found = nearest(chosen, room, estimate(chosen, "cpu"), lambda _: None)
    assert found.overrides == {"train.micro_batch_pairs": 2}


def test_everything_is_tried_and_what_is_said_can_be_copied(load) -> None:
    chosen = load("train.micro_batch_pairs=4", "train.batch_pairs=4", "base.dtype=bfloat16", "train.precision=bfloat16")
    arguments = ["train.micro_batch_pairs=4", "base.dtype=bfloat16", "train.precision=bfloat16"]
    whole = estimate(chosen, "cpu")
    told: list[str] = []
    tight = nearest(chosen, 50_000, whole, told.append)
    assert tight.too_large is not None
    tried = " ".join(told)
    order = ["micro_batch_pairs=1", "pair_pass=split", "gradient_checkpointing=full", "adamw8bit", "int8", "nf4"]
    assert [tried.index(one) for one in order] == sorted(tried.index(one) for one in order)
    assert tight.overrides["evaluate.prompts"] == 0
    again = estimate(load(*arguments, *tight.arguments()), "cpu")
    assert again.needed() == tight.needed
    assert again.needed(TRAINING) < 0.5 * whole.needed(TRAINING)


def test_pictures_are_drawn_in_smaller_batches_or_not_at_all(load) -> None:
    chosen = load("train.micro_batch_pairs=1", "train.pair_pass=split", "evaluate.batch=64")
    whole = estimate(chosen, "cpu")
    assert whole.highest() == DECODING
    eight = estimate(load("evaluate.batch=8"), "cpu", EVALUATION).phases[DECODING].total
    found = nearest(chosen, eight, whole, lambda _: None)
    assert found.overrides["evaluate.batch"] == 8


def test_the_plan_says_it(load, monkeypatch) -> None:
    """As if every byte were a MiB."""

    def large(chosen: recipe.Recipe, device: Kind = "cuda", among: Collection[str] = memory.PHASES) -> Estimate:
        found = estimate(chosen, "cpu", among)
        phases = {name: replace(peak, total=peak.total << 20) for name, peak in found.phases.items()}
        return replace(found, phases=phases, device="cuda")

    monkeypatch.setattr(memory, "estimate", large)
    chosen = load("train.micro_batch_pairs=4", "evaluate.batch=64")
    whole = large(chosen)
    assert whole.highest() == DECODING
    room = (whole.needed(memory.ENCODING) >> 20) + 1
    document = plan.run(chosen, False, gpu=f"{room}MiB", quiet=True)
    assert document["fits"] is False
    assert document["nearest"]["fits"] is True
    assert 1024 * document["nearest"]["needed_gib"] <= room
    shown = text(document)
    assert " ".join(document["nearest"]["overrides"]) in shown
    assert f"with that {document['nearest']['needed_gib']:.2f} GiB are needed" in shown
    document = plan.run(chosen, False, gpu=f"{room - 2}MiB", quiet=True)
    assert document["nearest"]["fits"] is False
    assert "nothing that was tried fits" in text(document)
    assert "`lora-dpo cache" in text(document)


RECIPE = """
[data]
path = "{folder}/pairs.parquet"
heldout_fraction = 0.0
resolution = 64
[base]
family = "stable_diffusion"
model = "{folder}/base"
[adapter]
rank = 2
[method]
kind = "dpo"
[train]
steps = 1
batch_pairs = 2
gradient_checkpointing = "auto"
device = "cpu"
[evaluate]
prompts = 0
implicit_pairs = 0
[output]
cache_dir = "{folder}/cache"
"""


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("automatic")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 4)
    (folder / "small.toml").write_text(RECIPE.format(folder=folder))

    def loaded(room: float, *overrides: str) -> recipe.Recipe:
        return recipe.load(str(folder / "small.toml"), [f"train.memory_budget_gb={room / memory.GIB}", *overrides])

    return loaded


def test_a_run_chooses_keeps_and_obeys_its_budget(automatic, tmp_path, monkeypatch) -> None:
    """What tensors really held is what was traced, and the choice is seen in it."""
    needed = {
        policy: estimate(fitting.settled(automatic(1), policy), "cpu", TRAINING).needed() for policy in ("none", "full")
    }
    room = (needed["none"] + needed["full"]) // 2
    held: list[int] = []

    def measured(method, batch, *more):
        with LiveMemory() as live:
            sums = accumulate(method, batch, *more)
        held.append(live.peak)
        return sums

    monkeypatch.setattr(step, "accumulate", measured)
    for name, size in (("plain", needed["none"]), ("some", room), ("full", needed["full"])):
        build.run(automatic(size), tmp_path / name, quiet=True)
    chosen = {
        name: json.loads((tmp_path / name / RECOMPUTED).read_text())["gradient_checkpointing"]
        for name in ("plain", "some", "full")
    }
    assert (chosen["plain"], chosen["full"]) == ("none", "full")
    assert 0 < chosen["some"] < estimate(fitting.settled(automatic(1), "full"), "cpu", TRAINING).blocks
    assert held[0] > held[1] > held[2]
    learned = [load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in chosen]
    for name, weight in learned[0].items():
        assert all(torch.equal(other[name], weight) for other in learned[1:])
    # Resumed, nothing is traced again; with another budget it is.
    monkeypatch.setattr(memory, "estimate", lambda *_: pytest.fail("an optimizer step was traced"))
    device = torch.device("cpu")
    assert fitting.automatic(automatic(room), tmp_path / "some", device, print) == chosen["some"]
    with pytest.raises(pytest.fail.Exception):
        fitting.automatic(automatic(room + 1), tmp_path / "some", device, print)


def test_a_step_that_fits_in_no_way_is_refused_before_it_begins(automatic, tmp_path) -> None:
    with pytest.raises(UserError, match=r"more than 0\.00 GiB even with all activations") as error:
        fitting.automatic(automatic(1000), tmp_path, torch.device("cpu"), print)
    assert error.value.where == "train.memory_budget_gb"
    assert "lora-dpo plan" in (error.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_a_budget_is_the_free_memory_of_the_device(automatic, tmp_path, monkeypatch) -> None:
    chosen = automatic(1, "train.device=auto")
    chosen = chosen.model_copy(update={"train": chosen.train.model_copy(update={"memory_budget_gb": None})})
    with pytest.raises(UserError, match=r"has to be given on this device \(mps\)"):
        fitting.automatic(chosen, tmp_path, torch.device("mps"), print)
    full = estimate(fitting.settled(chosen, "full"), "cuda", TRAINING).needed()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (full - memory.CONTEXT_BYTES, 10 * full))
    assert fitting.automatic(chosen, tmp_path, torch.device("cuda"), print) == "full"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.gradient_checkpointing=none", "train.memory_budget_gb=3"], "it has no effect but with"),
        (["train.gradient_checkpointing=auto", "train.device=cpu"], "needs it on a CPU"),
    ],
)
def test_a_budget_without_an_effect_and_a_choice_without_a_budget_are_refused(load, overrides, part) -> None:
    with pytest.raises(UserError, match=part):
        load(*overrides)


def test_a_plan_shows_what_the_choice_comes_to(automatic) -> None:
    full = estimate(fitting.settled(automatic(1), "full"), "cpu", TRAINING).needed()
    document = plan.run(automatic(full), False, quiet=True)
    assert document["gradient_checkpointing"] == "full"
    assert "all activations are computed again" in text(document)
