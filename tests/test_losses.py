"""The losses against an independent oracle, closed forms and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo.families.schedule import Schedule
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


def test_timestep_weights_of_stable_diffusion():
    """T/2·(SNR_{t−1}/SNR_t − 1): figures worked out apart from this code."""
    alphas = Schedule({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}).alphas_cumprod
    elbo = losses.timestep_weights(alphas, "elbo")
    assert elbo[[1, 50, 999]].tolist() == pytest.approx([503, 11.6, 6.1], rel=5e-3)
    assert elbo.argmin() == 422
    assert elbo.min().item() == pytest.approx(3.28, rel=5e-3)
    assert elbo[1:].mean().item() == pytest.approx(6.53, rel=1e-3)
    assert elbo[0] == elbo[1]
    assert torch.equal(losses.timestep_weights(alphas, "constant"), torch.ones(1000))
    snr = alphas.double() / (1 - alphas.double())
    bounded = losses.timestep_weights(alphas, "min_snr", gamma=5.0).double() * snr
    torch.testing.assert_close(bounded, snr.clamp(max=5.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["constant", "elbo", "min_snr"])
def test_timestep_weights_are_finite_without_a_signal_at_the_end(kind):
    zero_terminal = Schedule({"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}).alphas_cumprod.clone()
    zero_terminal[-1] = 0.0
    weights = losses.timestep_weights(zero_terminal, kind)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()


def test_a_timestep_weight_is_inside_the_sigmoid():
    """It multiplies u, so pairs far apart saturate sooner; around the loss it would be a weight of pairs."""
    values = [torch.tensor([v, v]) for v in (0.5, 1.0, 1.0, 1.0)]
    weight = torch.tensor([1.0, 4.0])
    u = losses.margin(*values, 2.0, weight)
    assert u.tolist() == [0.5, 2.0]
    costs = losses.cross_entropy(u)
    assert costs[1].item() == pytest.approx(math.log1p(math.exp(-2)))
    assert costs[1].item() < costs[0].item()


us = st.floats(-30, 30, width=32)
labels = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])


def of_u(name: str, label: float):
    """(ours, the closed form of its derivative, an oracle in float64 up to a constant) by name."""
    sigma = lambda u: np.exp(-np.logaddexp(0, -u))  # noqa: E731
    log_sigma = lambda u: -np.logaddexp(0, -u)  # noqa: E731
    q = label * 0.98 + 0.01
    known = {
        "cross_entropy": (
            lambda u: losses.cross_entropy(u, label),
            lambda u: sigma(u) - label,
            lambda u: -label * log_sigma(u) - (1 - label) * log_sigma(-u),
        ),
        "robust": (
            lambda u: losses.cross_entropy(u, losses.debiased(label, 0.2)),
            lambda u: sigma(u) - (label - 0.2) / 0.6,
            lambda u: (
                label * (-0.8 * log_sigma(u) + 0.2 * log_sigma(-u)) / 0.6
                + (1 - label) * (-0.8 * log_sigma(-u) + 0.2 * log_sigma(u)) / 0.6
            ),
        ),
        "ipo": (
            lambda u: losses.ipo(u, label),
            lambda u: 2 * (u - (label - 0.5)),
            lambda u: label * (u - 0.5) ** 2 + (1 - label) * (u + 0.5) ** 2 - label * (1 - label),
        ),
        "hinge": (
            lambda u: losses.hinge(u, label),
            lambda u: -label * (u < 1) + (1 - label) * (u > -1),
            lambda u: label * np.maximum(0, 1 - u) + (1 - label) * np.maximum(0, 1 + u),
        ),
        "dmpo": (
            lambda u: losses.dmpo(u, 0.01, label),
            lambda u: sigma(u) * sigma(-u) * (u - np.log(q / (1 - q))),
            lambda u: sigma(u) * (log_sigma(u) - np.log(q)) + sigma(-u) * (log_sigma(-u) - np.log(1 - q)),
        ),
    }
    return known[name]


OF_U = ["cross_entropy", "robust", "ipo", "hinge", "dmpo"]


@pytest.mark.parametrize("name", OF_U)
@calm
@given(us, labels)
def test_losses_of_the_margin_equal_their_oracles(name, value, label):
    ours, slope, oracle_of = of_u(name, label)
    u = torch.tensor([value], requires_grad=True)
    loss = ours(u)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(oracle_of(np.float64(value))), rel=1e-5, abs=1e-5)
    loss.sum().backward()
    assert u.grad is not None
    if name != "hinge" or abs(value) != 1:
        assert u.grad.item() == pytest.approx(float(slope(np.float64(value))), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", OF_U)
@calm
@given(us, labels)
def test_a_pair_turned_round_has_the_label_turned_round(name, value, label):
    u = torch.tensor([value])
    one, other = of_u(name, label)[0](u), of_u(name, 1 - label)[0](-u)
    assert one.item() == pytest.approx(other.item(), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", OF_U)
def test_a_tie_pulls_the_margin_to_zero(name):
    ours = of_u(name, 0.5)[0]
    u = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    ours(u).sum().backward()
    assert u.grad is not None
    assert u.grad[0] < 0 < u.grad[2]
    assert u.grad[1].item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", OF_U)
@pytest.mark.parametrize("value", [1e6, -1e6])
def test_losses_of_huge_margins_are_finite(name, value):
    u = torch.tensor([value], requires_grad=True)
    loss = of_u(name, 0.9)[0](u)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()


def test_plain_labels_give_diffusion_dpo():
    rng = np.random.default_rng(3)
    values = [torch.from_numpy(v) for v in rng.uniform(0, 1, (4, 32)).astype(np.float32)]
    plain = losses.dpo(*values, 20.0)
    torch.testing.assert_close(losses.cross_entropy(losses.margin(*values, 20.0)), plain)
    assert losses.smoothed(1.0, 0.0) == losses.debiased(1.0, 0.0) == 1.0


def test_labels_per_pair_are_those_of_single_pairs():
    u, label = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.5, 0.7])
    for loss in (losses.cross_entropy, losses.ipo, losses.hinge, lambda u, p: losses.dmpo(u, 0.05, p)):
        one_by_one = [loss(u[i : i + 1], label[i].item()).item() for i in range(3)]
        assert loss(u, label).tolist() == pytest.approx(one_by_one, rel=1e-6)


def test_smoothing_stops_at_a_finite_margin():
    """cDPO is least at logit(1 − ε), DMPO at logit(1 − α)."""
    for loss, q in ((lambda u: losses.cross_entropy(u, losses.smoothed(1.0, 0.1)), 0.9), (losses.dmpo, 0.99)):
        u = torch.tensor([math.log(q / (1 - q))], requires_grad=True)
        loss(u).sum().backward()
        assert u.grad is not None
        assert u.grad.item() == pytest.approx(0, abs=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """The expectation over flips of its loss is the loss of the true labels."""
    rate, u = 0.2, torch.linspace(-5, 5, 11)
    label = losses.debiased(1.0, rate)
    expected = (1 - rate) * losses.cross_entropy(u, label) + rate * losses.cross_entropy(-u, label)
    torch.testing.assert_close(expected, losses.cross_entropy(u))
    assert losses.debiased(losses.smoothed(0.7, rate), rate) == pytest.approx(0.7)
    for wrong in (0.5, 0.9, -0.1):
        with pytest.raises(ValueError, match="flipped"):
            losses.debiased(1.0, wrong)


def test_dmpo_wants_a_smoothing():
    with pytest.raises(ValueError, match="α"):
        losses.dmpo(torch.zeros(1), 0.0)


def test_dmpo_gives_up_on_what_is_strongly_wrong():
    """Reversed divergence: a margin of −20 has next to no gradient, where DPO's is full."""
    u = torch.tensor([-20.0], requires_grad=True)
    losses.dmpo(u).sum().backward()
    assert u.grad is not None
    assert abs(u.grad.item()) < 1e-6


def adam_step(of_errors, errors: list[float]) -> float:
    """How far one AdamW step at rate 0.001 moves a parameter that is added to the winner's error."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    e_w, e_l, r_w, r_l = column(*errors)
    of_errors(e_w + 1e-3 * parameter, e_l, r_w, r_l).sum().backward()
    optimizer.step()
    return parameter.abs().item()


def test_ipo_is_scaled_to_where_adam_can_see_it():
    """(m/2 − 1/(2β))² and (u − ½)² have the same minimum, but only one of them a gradient above AdamW's ε = 1e-8."""
    beta, near = 5000.0, [0.1, 0.12, 0.1, 0.12]

    def raw(e_w, e_l, r_w, r_l):
        return (((r_w - e_w) - (r_l - e_l)) / 2 - 1 / (2 * beta)).square()

    def ours(*errors):
        return losses.ipo(losses.margin(*errors, beta))

    assert adam_step(ours, near) == pytest.approx(1e-3, rel=1e-3)
    assert adam_step(raw, near) < 0.95e-3
    # A LoRA's gradients are smaller than that of a parameter added to the error; 100 times:
    smaller = adam_step(lambda *e: 0.01 * raw(*e), near)
    assert smaller < 0.15e-3
    assert adam_step(lambda *e: 0.01 * ours(*e), near) == pytest.approx(1e-3, rel=1e-2)
    values = [t.double() for t in column(0.1, 0.12, 0.1001, 0.1198)]
    torch.testing.assert_close(beta**2 * raw(*values), ours(*values).double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "ipo", "hinge", "dmpo"])
@calm
@given(quadruples, st.floats(-1, 1, width=32))
def test_shifting_both_errors_of_an_image_changes_nothing(name, values, by):
    """Only differences from the reference count, and only the difference of those."""
    exact = [torch.tensor([v], dtype=torch.float64) for v in values]
    loss = of_u(name, 1.0)[0]

    def at(e_w, e_l, r_w, r_l):
        return loss(losses.margin(e_w, e_l, r_w, r_l, 2.0)).item()

    e_w, e_l, r_w, r_l = exact
    before = at(*exact)
    assert at(e_w + by, e_l, r_w + by, r_l) == pytest.approx(before, rel=1e-4, abs=1e-4)
    assert at(e_w + by, e_l + by, r_w, r_l) == pytest.approx(before, rel=1e-4, abs=1e-4)


def test_beta_times_errors_over_the_same_factor_is_the_same():
    rng = np.random.default_rng(4)
    values = [torch.from_numpy(v) for v in rng.uniform(0, 1, (4, 16)).astype(np.float32)]
    torch.testing.assert_close(losses.margin(*values, 4.0), losses.margin(*(v / 8 for v in values), 32.0))


def test_auto_beta_leaves_the_wanted_share_of_the_gradient():
    for gap in (1e-3, 5e-4):
        beta = losses.auto_beta(gap)
        assert 1 / (1 + math.exp(beta / 2 * gap)) == pytest.approx(0.2)
    low, high = losses.AUTO_BETA_RANGE
    assert losses.auto_beta(0.0) == losses.auto_beta(1e-12) == high
    assert losses.auto_beta(10.0) == low
    assert losses.auto_beta(1e-3, target=0.4) < losses.auto_beta(1e-3, target=0.1)
    mean = 0.0
    for gap in (0.0, 1.0, 2.0):
        mean = losses.smoothed_gap(mean, gap, decay=0.75)
    assert mean == 1.25
