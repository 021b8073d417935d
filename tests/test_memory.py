"""The traced memory is what real tensors take, byte for byte, and follows its closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_dpo import memory, parts, recipe
from lora_dpo.errors import UserError
from lora_dpo.fake_device import FakeDevice
from lora_dpo.ledger import ACTIVATIONS, ADAPTER, GRADIENTS, OPTIMIZER, PARTS, REFERENCE, WEIGHTS, Ledger
from lora_dpo.memory import EVALUATION, FORWARD, GIB, PHASES, TRAINING, BlankPairs, estimate
from tests.support.models import save_random_sd, save_random_sdxl

BASE = [
    "data.path=.", "data.resolution=64", "data.aspect=square", "train.batch_pairs=4", "train.micro_batch_pairs=2",
    "train.optimizer=adamw", "train.gradient_checkpointing=none", "train.precision=float32", "base.dtype=float32",
    "adapter.rank=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"sdxl": save_random_sdxl(root / "sdxl"), "stable_diffusion": save_random_sd(root / "sd")}


@pytest.fixture(scope="module")
def load(folders):
    def loaded(*overrides: str, family: str = "sdxl") -> recipe.Recipe:
        folder = folders[family]
        base = [f"base.family={family}", f"base.model={folder}", f"base.vae={folder / 'vae'}"]
        return recipe.load("sdxl_lora", [*base, *BASE, *overrides])

    return loaded


def moved(adapters) -> None:
    """As after a step: prodigy doesn't keep a copy of weights that are 0."""
    for parameter in adapters.parameters().values():
        parameter.data.add_(0.01)


def on_real_tensors(chosen: recipe.Recipe) -> Ledger:
    family = parts.family(chosen, torch.device("cpu"))
    conditioning = family.encode_prompts(["a prompt"])
    family.release_encoders()
    adapters = parts.fresh_adapters(chosen, family)
    moved(adapters)
    pairs = BlankPairs(chosen.train.batch_pairs, family, chosen.data.resolution, conditioning)
    with Ledger() as ledger:
        ledger.count("elsewhere", conditioning.values())
        memory.optimizer_step(chosen, family, adapters, pairs, ledger, "cpu")
    return ledger


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("sdxl", []),
        ("sdxl", ["train.gradient_checkpointing=full", "train.ema_decay=0.9"]),
        ("sdxl", ["train.gradient_checkpointing=3", "adapter.dora=true", "train.pair_pass=split"]),
        ("stable_diffusion", ["train.precision=bfloat16", "train.gradient_checkpointing=full"]),
        ("sdxl", ["base.dtype=bfloat16", "train.precision=bfloat16", "train.optimizer=adamw8bit",
                  "adapter.dora=true"]),
        ("sdxl", ["base.dtype=bfloat16", "base.quantization=nf4", "train.optimizer=prodigy",
                  "train.learning_rate=1.0"]),
        ("stable_diffusion", ["base.quantization=int8", "train.pair_pass=split",
                              "train.optimizer=schedule_free_adamw"]),
        ("stable_diffusion", ["method.kind=sft", "adapter.dropout=0.5", "adapter.targets=all-linear+conv",
                              "train.optimizer=adafactor"]),
        ("stable_diffusion", ["method.kind=dmpo", "adapter.rslora=true"]),
    ],
)  # fmt: skip
def test_a_step_takes_what_real_tensors_take_byte_for_byte(load, family, overrides) -> None:
    chosen = load(*overrides, family=family)
    real, traced = on_real_tensors(chosen).peaks, estimate(chosen, "cpu", TRAINING).phases
    assert {name: real[name] for name in TRAINING if name in real} == traced


def test_parts_follow_from_the_numbers_of_weights(load) -> None:
    chosen = load("base.dtype=bfloat16", "train.precision=bfloat16")
    family = parts.family(chosen, torch.device("cpu"))
    adapters = parts.fresh_adapters(chosen, family)
    trained = sum(p.numel() for p in adapters.parameters().values())
    frozen = sum(p.numel() for p in family.denoiser.parameters()) - trained
    held = estimate(chosen, "cpu", TRAINING).phases[FORWARD].parts
    assert held[WEIGHTS] == 2 * frozen
    assert held[ADAPTER] == held[GRADIENTS] == 4 * trained
    assert held[OPTIMIZER] == 2 * 4 * trained + 4 * len(adapters.parameters())  # two moments, and a number of steps


def test_eight_bit_state_is_a_quarter_and_paged_state_is_elsewhere(load, monkeypatch) -> None:
    monkeypatch.setattr(memory, "PAGED_ELEMENTS", 4096)
    state = {
        kind: estimate(load(f"train.optimizer={kind}", "adapter.rank=512"), "cpu", TRAINING).phases[FORWARD]
        for kind in ("adamw", "adamw8bit", "paged_adamw8bit")
    }
    whole = state["adamw"].parts[OPTIMIZER]
    assert 0.25 * whole < state["adamw8bit"].parts[OPTIMIZER] < 0.3 * whole
    assert state["paged_adamw8bit"].parts[OPTIMIZER] < 0.05 * whole


def test_gradients_are_there_from_the_second_pass_on(load) -> None:
    several = estimate(load("train.micro_batch_pairs=1"), "cpu", TRAINING).phases[FORWARD].parts
    one = estimate(load("train.batch_pairs=1", "train.micro_batch_pairs=1"), "cpu", TRAINING).phases[FORWARD].parts
    assert several.pop(GRADIENTS) == several[ADAPTER]
    assert one == several


def test_settings_that_save_memory_do(load) -> None:
    def training(*overrides: str) -> int:
        found = estimate(load("base.dtype=bfloat16", "train.micro_batch_pairs=2", *overrides), "cuda", TRAINING)
        return found.phases[found.highest()].total

    plain, split = training(), training("train.pair_pass=split")
    assert training("train.gradient_checkpointing=full") < plain
    assert split < training("train.micro_batch_pairs=1") < plain


def test_sdxls_unet_has_its_size_without_its_weights() -> None:
    """2,567 million weights, 2,208 of them in the attention blocks' linear layers."""
    fake = FakeDevice("cuda")
    chosen = recipe.load("sdxl_lora", ["data.path=.", "base.quantization=nf4"])
    family, _ = parts.hollow_family(chosen, fake)
    memory._attached(chosen, family, fake)
    trained = sum(p.nbytes for p in family.denoiser.parameters() if p.requires_grad)
    assert (fake.ledger.alive.total - trained) / GIB == pytest.approx(1.73, abs=0.01)


def test_the_reference_is_no_second_network_and_leaves_its_errors_alone(load) -> None:
    phases = estimate(load(), "cpu", TRAINING).phases
    assert phases[REFERENCE].parts[REFERENCE] > 0
    assert phases[REFERENCE].parts[WEIGHTS] == phases[FORWARD].parts[WEIGHTS]
    assert phases[FORWARD].parts[REFERENCE] < 0.1 * phases[REFERENCE].parts[REFERENCE]


def test_every_phase_of_a_run_is_traced_and_its_parts_add_up(load) -> None:
    found = estimate(load("evaluate.batch=8"))
    assert list(found.phases) == list(PHASES)
    for peak in found.phases.values():
        assert peak.total == sum(peak.parts.values())
        assert set(peak.parts) <= set(PARTS)
    assert found.peak.total == max(peak.total for peak in found.phases.values())
    assert found.needed() == found.peak.total + found.allowance(found.peak) > found.peak.total + GIB // 2
    assert found.picture_bytes((64, 96)) == 2 * 4 * 4 * 16 * 24 + 48  # mean and deviation, float32, 4 × 16 × 24
    assert found.prompt_bytes == 4 * (16 * 32 + 16)
    assert found.notes == []


def test_a_stored_reference_changes_nothing_that_is_traced(load) -> None:
    """Its files aren't opened."""
    visits = "method.visits_per_pair=2"
    plain, stored = (
        estimate(load(visits, *more), "cpu", TRAINING).phases for more in ([], ["method.reference_cache=true"])
    )
    assert plain == stored


def test_a_reference_that_is_an_adapter_is_held_too(load, tmp_path) -> None:
    (tmp_path / "start.safetensors").touch()
    start = f"adapter.start={tmp_path / 'start.safetensors'}"
    of_base, of_adapter = (
        estimate(load(start, *more), "cpu", TRAINING).phases[FORWARD].parts
        for more in ([], ["method.reference=adapter"])
    )
    assert of_adapter[WEIGHTS] - of_base[WEIGHTS] == of_base[ADAPTER]


def test_evaluation_alone_is_traced_as_after_training(load) -> None:
    chosen = load("evaluate.batch=8")
    whole, alone = estimate(chosen).phases, estimate(chosen, among=EVALUATION).phases
    assert alone == {name: whole[name] for name in EVALUATION}


def test_sdxls_encoders_have_their_sizes_without_their_weights() -> None:
    """818 million weights of text encoders, 84 million of VAE."""
    chosen = recipe.load("sdxl_lora", ["data.path=."])
    found = estimate(chosen, among=["encode images", "encode prompts"])
    assert "taken for SDXL" in found.notes[0]
    assert found.phases["encode prompts"].parts[WEIGHTS] == pytest.approx(2 * 817.7e6, rel=1e-3)
    assert found.phases["encode images"].parts[WEIGHTS] == pytest.approx(4 * 83.65e6, rel=1e-3)
    assert found.phases["encode images"].parts[ACTIVATIONS] > 4 * GIB  # two pictures of 1024 pixels, in float32


def test_a_target_that_the_base_lacks_is_refused(load) -> None:
    with pytest.raises(UserError, match="no linear or convolution layer"):
        estimate(load('adapter.targets=["to_x"]'))
