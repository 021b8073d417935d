"""The nearest settings that fit: traced, not guessed, as large as they can be, and in words that can be copied."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lora_dpo import fitting, memory, plan, recipe
from lora_dpo.fake_device import Kind
from lora_dpo.fitting import fewest_recomputed, nearest
from lora_dpo.memory import DECODING, EVALUATION, TRAINING, Estimate
from lora_dpo.plan_table import text
from tests.support.models import save_random_sd
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
