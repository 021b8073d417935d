"""Learning rates as a function of the step, and the optimizers' choice."""

from __future__ import annotations

import sys

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


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_one_step_is_adamws(kind):
    """The first step moves every weight by the rate, against the sign of its gradient, after the decay."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8192).reshape(64, 128))
    optimizer = optimizers.build(kind, {"weight": weight}, learning_rate=0.01, weight_decay=0.1)
    start = weight.detach().clone()
    weight.grad = torch.where(torch.arange(8192).reshape(64, 128) % 2 == 0, 0.5, -2.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start * (1 - 0.01 * 0.1) - 0.01 * weight.grad.sign())


def test_a_missing_bitsandbytes_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit.*\n.*pip install"):
        optimizers.build("adamw8bit", {"weight": torch.nn.Parameter(torch.ones(2))}, learning_rate=1.0)
