"""Learning rates as a function of the step, and the optimizers' choice."""

from __future__ import annotations

import copy
import sys
from typing import get_args

import pytest
import torch

from lora_dpo import optimizers
from lora_dpo.errors import UserError
from lora_dpo.optimizers import learning_rate_at


def rates(schedule: str, steps: int = 10, warmup_steps: int = 0) -> list[float]:
    options = {"schedule": schedule, "learning_rate": 2.0, "steps": steps, "warmup_steps": warmup_steps}
    return [learning_rate_at(step, **options) for step in range(steps + 1)]


def test_constant_with_warm_up():
    assert rates("constant", 5, 3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_starts_full_and_ends_at_zero(schedule):
    for warmup in (0, 4):
        values = rates(schedule, 10, warmup)
        assert values[warmup] == 2.0
        assert values[10] == pytest.approx(0.0, abs=1e-12)
        assert values[9] > 0
        assert values[warmup:] == sorted(values[warmup:], reverse=True)
        assert values[:warmup] == sorted(values[:warmup])


def test_halfway():
    assert [rates("linear")[5], rates("cosine")[5]] == pytest.approx([1.0, 1.0])
    assert rates("linear")[2] == pytest.approx(1.6)
    assert rates("cosine")[2] == pytest.approx(1 + 0.8090169943749475)


def test_a_warm_up_longer_than_the_run_never_reaches_the_full_rate():
    for schedule in ("constant", "linear", "cosine"):
        found = rates(schedule, 3, 7)
        assert found == pytest.approx([0.25, 0.5, 0.75, 1.0])


KINDS = get_args(optimizers.Kind)
CPU_KINDS = [kind for kind in KINDS if kind != "paged_adamw8bit"]


def one(kind: str, rate: float, **options) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128))
    return weight, optimizers.build(kind, {"weight": weight}, learning_rate=rate, **options)  # pyright: ignore


GRADIENT = torch.where(torch.arange(8192).reshape(64, 128) % 2 == 0, 0.5, -2.0)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion8bit"])
def test_one_step_moves_by_the_rate(kind):
    """The first step moves every weight by the rate, against the sign of its gradient, after the decay."""
    weight, optimizer = one(kind, 0.01, weight_decay=0.1)
    start = weight.detach().clone()
    weight.grad = GRADIENT.clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start * (1 - 0.01 * 0.1) - 0.01 * GRADIENT.sign())


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_the_optimizer_has_the_recipes_rate_and_its_steps_scale_with_it(kind):
    moved = []
    for rate in (2.0, 4.0) if kind == "prodigy" else (0.01, 0.02):
        weight, optimizer = one(kind, rate, weight_decay=0.0)
        assert [group["lr"] for group in optimizer.param_groups] == [rate]
        start = weight.detach().clone()
        weight.grad = GRADIENT.clone()
        optimizer.step()
        with optimizers.evaluation_weights(optimizer):
            moved.append((weight.detach() - start).abs().mean().item())
    # Prodigy's own step begins at 1e-6, where float32 rounds.
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.05 if kind == "prodigy" else 1e-3)


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_it_goes_downhill(kind):
    weight, optimizer = one(kind, 1.0 if kind == "prodigy" else 0.02, weight_decay=0.0)
    target = torch.zeros_like(weight)
    for _ in range(400 if kind == "prodigy" else 60):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    with optimizers.evaluation_weights(optimizer):
        assert weight.detach().square().mean() < 0.5 * torch.linspace(-1, 1, 8192).square().mean()


def test_schedule_free_evaluates_the_mean_of_its_path_and_trains_on_from_the_exact_point():
    weight, optimizer = one("schedule_free_adamw", 0.01)
    for _ in range(3):
        weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    trained, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with optimizers.evaluation_weights(optimizer):
        averaged = weight.detach().clone()
    assert torch.equal(weight, trained)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(optimizer.state_dict()["state"][0]["z"], state["state"][0]["z"])
    # y = β·x + (1 - β)·z (Defazio et al. 2024, eq. 3)
    torch.testing.assert_close(0.9 * averaged + 0.1 * state["state"][0]["z"], trained)
    assert not torch.equal(averaged, trained)
    optimizers.use_evaluation_weights(optimizer)
    assert torch.equal(weight, averaged)


def test_others_evaluate_what_they_train():
    weight, optimizer = one("adamw", 0.01)
    before = weight.detach().clone()
    with optimizers.evaluation_weights(optimizer):
        assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("prodigy", "prodigyopt", "prodigy"),
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_library_is_said_with_the_remedy(monkeypatch, kind, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{kind} needs.*\n.*pip install \"lora-dpo\[{extra}\]"):
        optimizers.require(kind, torch.device("cpu"))


def test_paging_needs_a_gpu():
    with pytest.raises(UserError, match=r"paged_adamw8bit.*\n.*adamw8bit"):
        optimizers.require("paged_adamw8bit", torch.device("cpu"))


def test_every_kind_is_the_recipes():
    from lora_dpo.recipe_sections import Train

    assert get_args(Train.model_fields["optimizer"].annotation) == KINDS
