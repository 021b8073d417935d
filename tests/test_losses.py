"""The losses against an independent oracle, closed forms and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.methods import losses

BETAS = [1.0, 20.0, 2000.0, 5000.0]
errors = st.floats(0, 10, width=32)
# A busy machine is no failure, and a run repeats.
calm = settings(deadline=None, derandomize=True)
quadruples = st.tuples(errors, errors, errors, errors)


def oracle(e_w, e_l, ref_w, ref_l, beta):
    """−log σ(u) in float64, written from eq. 46 and not from the code."""
    u = -0.5 * beta * ((np.float64(e_w) - ref_w) - (np.float64(e_l) - ref_l))
    return np.logaddexp(0, -u), u


def column(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_equals_the_oracle(beta):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 0.01, (4, 64)).astype(np.float32)
    expected, u = oracle(*values.astype(np.float64), beta)
    tensors = [torch.from_numpy(v) for v in values]
    # Four float32 errors of size 0.01 leave u uncertain by about β/2 · 2e-9.
    np.testing.assert_allclose(losses.dpo(*tensors, beta).numpy(), expected, rtol=1e-5, atol=beta * 3e-9)
    np.testing.assert_allclose(losses.margin(*tensors, beta).numpy(), u, rtol=1e-5, atol=beta * 3e-9)


@calm
@given(errors, errors, st.sampled_from(BETAS))
def test_agreement_with_the_reference_costs_ln_2(winner, loser, beta):
    e_w, e_l = column(winner, loser)
    assert losses.margin(e_w, e_l, e_w, e_l, beta).item() == 0.0
    assert losses.dpo(e_w, e_l, e_w, e_l, beta).item() == np.float32(math.log(2))


@calm
@given(quadruples, st.sampled_from(BETAS))
def test_swapping_winner_and_loser_flips_the_margin(values, beta):
    e_w, e_l, r_w, r_l = column(*values)
    u = losses.margin(e_w, e_l, r_w, r_l, beta)
    assert losses.margin(e_l, e_w, r_l, r_w, beta).item() == -u.item()
    # −log σ(u) + log σ(−u) = −u
    difference = losses.dpo(e_w, e_l, r_w, r_l, beta) - losses.dpo(e_l, e_w, r_l, r_w, beta)
    torch.testing.assert_close(difference, -u, rtol=1e-5, atol=1e-5)


@calm
@given(quadruples, st.sampled_from(BETAS))
def test_gradient_is_the_closed_form(values, beta):
    """∂/∂(e_w − e_l) of −log σ(u) is (β/2)·(1 − σ(u))."""
    e_w, e_l, r_w, r_l = (t.requires_grad_() for t in column(*values))
    losses.dpo(e_w, e_l, r_w, r_l, beta).sum().backward()
    _, u = oracle(*values, beta)
    expected = beta / 2 * np.exp(-np.logaddexp(0, u))
    assert e_w.grad is not None
    assert e_l.grad is not None
    assert e_w.grad.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert e_l.grad.item() == -e_w.grad.item()


@pytest.mark.parametrize(("e_w", "expected"), [(1e6, 2.5e9), (-1e6, 0.0)])
def test_huge_margins_neither_overflow_nor_vanish(e_w, expected):
    values = column(e_w, 0.0, 0.0, 0.0)
    values[0].requires_grad_()
    loss = losses.dpo(*values, 5000.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert values[0].grad is not None
    assert values[0].grad.item() == pytest.approx(2500.0 if e_w > 0 else 0.0)


def test_half_precision_errors_are_compared_in_float32():
    values = [torch.tensor([v], dtype=torch.bfloat16) for v in (0.5, 0.25, 0.25, 0.25)]
    assert losses.margin(*values, 3.0).dtype == torch.float32
    assert losses.dpo(*values, 3.0).item() == pytest.approx(oracle(0.5, 0.25, 0.25, 0.25, 3.0)[0])


def test_sft_is_the_error():
    error = torch.tensor([0.25, 1.0])
    assert torch.equal(losses.sft(error), error)


@pytest.mark.parametrize(
    ("beta", "shape", "expected"),
    [(5000.0, (4, 64, 64), 0.1526), (2000.0, (4, 64, 64), 0.0610), (5000.0, (4, 128, 128), 0.0381)],
)
def test_sum_form_beta_of_known_models(beta, shape, expected):
    assert losses.sum_form_beta(beta, shape) == pytest.approx(expected, abs=5e-5)


def test_sum_form_beta_weighs_summed_errors_alike():
    rng = np.random.default_rng(1)
    squared = torch.from_numpy(rng.uniform(0, 1, (4, 3, 2, 4, 4)).astype(np.float32))
    means = squared.mean(dim=(2, 3, 4))
    sums = squared.sum(dim=(2, 3, 4))
    by_sum = -losses.sum_form_beta(50.0, (2, 4, 4)) * ((sums[0] - sums[2]) - (sums[1] - sums[3]))
    torch.testing.assert_close(losses.margin(*means, 50.0), by_sum)
