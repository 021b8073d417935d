"""Losses beside those of the margin: of single images, of predictions, and the safeguard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_dpo.methods import losses


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def mean(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mean(dim=(1, 2, 3))


# --- KTO

KTO_BETA = 2000.0


def kto_oracle(gain, desirable, z, beta, weights=(1.0, 1.0)):
    sign = np.where(desirable, 1.0, -1.0)
    weight = np.where(desirable, *weights)
    return weight * (1 - 1 / (1 + np.exp(-sign * beta / 2 * (gain - z))))


def test_kto_equals_the_oracle():
    gain, desirable = random(32, scale=1e-3), torch.arange(32) % 3 == 0
    for weights in ((1.0, 1.0), (0.5, 2.0)):
        got = losses.kto(
            gain, desirable, 2e-4, beta=KTO_BETA, desirable_weight=weights[0], undesirable_weight=weights[1]
        )
        expected = kto_oracle(gain.double().numpy(), desirable.numpy(), 2e-4, KTO_BETA, weights)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_kto_gradient_is_the_closed_form_and_leaves_z_alone():
    gain = random(8, scale=1e-3).requires_grad_()
    desirable = torch.arange(8) % 2 == 0
    z = gain.mean().clamp(min=0)
    losses.kto(gain, desirable, z, beta=KTO_BETA).sum().backward()
    sign = torch.where(desirable, 1.0, -1.0)
    s = torch.sigmoid(sign * KTO_BETA / 2 * (gain - z)).detach()
    assert gain.grad is not None
    torch.testing.assert_close(gain.grad, -sign * KTO_BETA / 2 * s * (1 - s))


def test_kto_of_the_reference_costs_half():
    got = losses.kto(torch.zeros(2), torch.tensor([True, False]), 0.0, beta=KTO_BETA)
    assert got.tolist() == [0.5, 0.5]


def test_the_reference_point_is_of_the_whole_step():
    """Clamped once, after everything is added up: the mean of clamped parts is another number."""
    gain = torch.tensor([3.0, -1.0, -4.0, 6.0])
    assert losses.reference_point(gain.mean().item()) == 1.0
    assert np.mean([losses.reference_point(g) for g in gain.tolist()]) == 2.25
    assert losses.reference_point(-1.25) == 0.0


def test_kto_turned_round():
    """Exchanging desirable and undesirable is the same as exchanging what is a gain, around z."""
    gain, desirable = random(16, scale=1e-3), torch.arange(16) % 2 == 0
    one = losses.kto(gain, desirable, 1e-4, beta=KTO_BETA)
    other = losses.kto(2e-4 - gain, ~desirable, 1e-4, beta=KTO_BETA)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_kto_of_huge_gains_is_finite():
    gain = torch.tensor([1e6, -1e6]).requires_grad_()
    losses.kto(gain, torch.tensor([True, True]), 0.0, beta=5000.0).sum().backward()
    assert gain.grad is not None
    assert gain.grad.tolist() == [0.0, 0.0]


# --- MaPO


def mapo_oracle(e_w, e_l, beta=0.1, s=0.5, timesteps=1000):
    e_w, e_l = np.asarray(e_w, np.longdouble), np.asarray(e_l, np.longdouble)
    phi = [s * e / np.expm1(s * e) for e in (e_w, e_l)]
    return (e_w + beta * np.logaddexp(0, -timesteps * (phi[0] - phi[1]))).astype(np.float64)


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.9, 1.2, 30.0])
def test_mapo_equals_the_oracle(size):
    rng = np.random.default_rng(0)
    e_w, e_l = (rng.uniform(0.5, 1.5, (2, 64)) * size).astype(np.float32)
    got = losses.mapo(torch.from_numpy(e_w), torch.from_numpy(e_l))
    # φ near 1 in float32 leaves T·Δφ uncertain by about 1e-4.
    np.testing.assert_allclose(got.numpy(), mapo_oracle(e_w, e_l), rtol=2e-6, atol=0.1 * 2e-4)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.03, 0.99, 1.01, 5.0])
def test_mapo_gradient_is_the_closed_form(size):
    """φ'(x) = (expm1 x − x·e^x)/expm1² is −½ at 0, where that formula is 0/0 and its terms cancel."""
    e_w, e_l = (torch.tensor([size * f], requires_grad=True) for f in (1.0, 1.0))
    losses.mapo(e_w, e_l, beta=1.0).sum().backward()
    x = np.longdouble(np.float32(size)) * 0.5
    slope = 0.5 * (np.expm1(x) - x * np.exp(x)) / np.expm1(x) ** 2
    assert e_w.grad is not None
    assert e_l.grad is not None
    assert e_l.grad.item() == pytest.approx(float(0.5 * 1000 * slope), rel=2e-6)
    assert e_w.grad.item() == pytest.approx(float(1 - 0.5 * 1000 * slope), rel=2e-6)


def test_mapo_at_no_error_at_all():
    e_w, e_l = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    loss = losses.mapo(e_w, e_l)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.1 * np.log(2))
    assert e_w.grad is not None
    assert e_w.grad.item() == pytest.approx(1 + 0.1 * 0.5 * 1000 * 0.25)


def test_mapo_with_exp_instead_of_expm1_is_wrong_in_float32():
    """Why it isn't written as published: at small errors exp(x) − 1 has few digits left, and T multiplies them."""
    e_w, e_l = np.float32(2e-4), np.float32(6e-4)

    def published(e):
        x = torch.tensor(e) * 0.5
        return x / (torch.exp(x) - 1)

    exact = 1000 * (0.5 * np.float64(e_w) / np.expm1(0.5 * np.float64(e_w)))
    exact -= 1000 * (0.5 * np.float64(e_l) / np.expm1(0.5 * np.float64(e_l)))
    wrong = 1000 * (published(e_w) - published(e_l)).item()
    assert abs(wrong - exact) > abs(exact)
    right = losses.mapo(torch.tensor([e_w]), torch.tensor([e_l]), beta=1.0).item() - e_w
    assert right == pytest.approx(np.logaddexp(0, -exact), abs=2e-4)


def test_mapo_without_its_second_term_is_sft():
    e_w, e_l = random(8).abs(), random(8, seed=1).abs()
    torch.testing.assert_close(losses.mapo(e_w, e_l, beta=0.0), losses.sft(e_w))


# --- DSPO


def dspo_setting(seed: int = 0) -> dict[str, torch.Tensor]:
    shape = (6, 4, 5, 5)
    names = ("target", "policy_w", "policy_l", "ref_w", "ref_l")
    made = {name: random(*shape, seed=seed + n) for n, name in enumerate(names)}
    return made | {"policy_w": made["policy_w"].requires_grad_()}


def dspo_of(s: dict[str, torch.Tensor], beta: float, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    errors = [mean((s[name] - s["target"]).square()) for name in ("policy_w", "policy_l", "ref_w", "ref_l")]
    u = losses.margin(*errors, beta)
    shift = mean((s["policy_w"] - s["ref_w"]).square())
    return losses.dspo(errors[0], errors[2], shift, u, strength), u


@pytest.mark.parametrize(("beta", "strength"), [(0.001, 0.001), (2.0, 0.4), (2000.0, 0.9)])
def test_dspo_equals_the_norm_that_it_stands_for(beta, strength):
    """Three scalars in place of ‖r_w − k·(ε_θ − ε_ref)‖², with the same gradient."""
    s = dspo_setting()
    got, u = dspo_of(s, beta, strength)
    k = (strength * torch.sigmoid(-u)).view(-1, 1, 1, 1)
    vector = (s["policy_w"] - s["target"]) - k * (s["policy_w"] - s["ref_w"])
    plain = mean(vector.square())
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)
    (mine,) = torch.autograd.grad(got.sum(), s["policy_w"], retain_graph=True)
    (theirs,) = torch.autograd.grad(plain.sum(), s["policy_w"])
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_dspo_starts_as_sft_and_without_strength_is_sft():
    s = dspo_setting()
    s["policy_w"] = s["ref_w"].clone().requires_grad_()
    error = mean((s["policy_w"] - s["target"]).square())
    torch.testing.assert_close(dspo_of(s, 2.0, 0.5)[0], error)
    torch.testing.assert_close(
        dspo_of(dspo_setting(), 2.0, 0.0)[0], mean((dspo_setting()["policy_w"] - s["target"]).square())
    )


def test_dspo_as_published_has_no_use_for_losers():
    """β = 0.001 for mean squared errors leaves σ(u) at ½ whatever the loser is."""
    s = dspo_setting()
    near = dspo_of(s, 0.001, 0.001)[0]
    far = dspo_of(s | {"policy_l": 3 * s["policy_l"]}, 0.001, 0.001)[0]
    torch.testing.assert_close(near, far, rtol=1e-5, atol=0)


# --- the safeguard


def residuals(angle: float, longer: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """r_w and r_l as images of 4 numbers, at an angle."""
    r_w = torch.tensor([1.0, 0.0, 0.0, 0.0])
    r_l = longer * torch.tensor([np.cos(angle), np.sin(angle), 0.0, 0.0], dtype=torch.float32)
    return r_w.view(1, 1, 2, 2), r_l.view(1, 1, 2, 2)


def safeguard_of(r_w: torch.Tensor, r_l: torch.Tensor, mu: float) -> float:
    return losses.safeguard(mean(r_w.square()), mean(r_w * r_l), mu).item()


def test_the_safeguard_limits_what_points_the_same_way():
    assert safeguard_of(*residuals(np.pi / 2 + 0.1), 0.9) == 1.0  # another way: no limit
    assert safeguard_of(*residuals(np.pi / 2 + 0.1, 100.0), 0.9) == 1.0
    assert safeguard_of(*residuals(0.0), 0.9) == pytest.approx(0.1)
    assert safeguard_of(*residuals(0.0, 2.0), 0.9) == pytest.approx(0.05)
    assert safeguard_of(*residuals(np.pi / 3), 0.5) == pytest.approx(1.0)
    assert safeguard_of(*residuals(0.0, 0.01), 0.5) == 1.0
    assert safeguard_of(*residuals(0.0), 1.0) == 0.0


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.6, 0.9])
def test_the_safeguard_keeps_the_promised_share_of_progress(mu):
    """(−∇e_w + λ∇e_l)·∇e_w ≤ −μ‖∇e_w‖², with equality where λ < 1."""
    r_w = random(200, 1, 2, 3)
    r_l = 0.5 * r_w + random(200, 1, 2, 3, seed=1)
    factor = losses.safeguard(mean(r_w.square()), mean(r_w * r_l), mu)
    assert factor.min() >= 0
    assert factor.max() <= 1
    progress = mean((r_w - factor.view(-1, 1, 1, 1) * r_l) * r_w)
    bound = mu * mean(r_w.square())
    limited = factor < 1
    assert 10 < limited.sum() < 190
    torch.testing.assert_close(progress[limited], bound[limited], rtol=1e-4, atol=1e-6)
    assert (progress >= bound - 1e-6).all()


def test_the_safeguard_is_per_pair_and_without_gradient():
    r_w, r_l = random(4, 1, 2, 2).requires_grad_(), random(4, 1, 2, 2, seed=2).requires_grad_()
    factor = losses.safeguard(mean(r_w.square()), mean(r_w * r_l), 0.9)
    assert not factor.requires_grad
    alone = [losses.safeguard(mean(r_w[i : i + 1].square()), mean((r_w * r_l)[i : i + 1]), 0.9) for i in range(4)]
    torch.testing.assert_close(factor, torch.cat(alone))


def test_a_scaled_gradient_leaves_the_value():
    error = torch.tensor([0.3, 0.7], requires_grad=True)
    scaled = losses.with_gradient_scaled(error, torch.tensor([0.25, 1.0]))
    assert torch.equal(scaled.detach(), error.detach())
    scaled.sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [0.25, 1.0]


# --- terms beside the loss


def test_terms_that_hold_the_winners_down():
    e_w = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    ref = torch.tensor([0.2, 0.2, 0.1])
    anchor = losses.anchor_term(e_w, ref, 20.0)
    assert anchor.tolist() == pytest.approx([0.0, 0.0, 2.0])
    (slope,) = torch.autograd.grad(anchor.sum(), e_w)
    assert slope.tolist() == [0.0, 0.0, 10.0]
    assert losses.sft_term(e_w, 20.0).tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_a_term_of_weight_one_pulls_as_hard_as_dpo_at_most():
    e_w = torch.tensor([0.5], requires_grad=True)
    others = [torch.tensor([v]) for v in (-100.0, 0.0, 0.0)]
    (of_dpo,) = torch.autograd.grad(losses.dpo(e_w, *others, 20.0).sum(), e_w)
    (of_term,) = torch.autograd.grad(losses.sft_term(e_w, 20.0).sum(), e_w)
    torch.testing.assert_close(of_dpo, of_term)


# --- the alternative of section S2


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_alternative_never_leaves_the_reference(sign):
    """Its gradient at B = 0 is exactly zero, in A and in B; one step away it isn't."""
    x_w, x_l = random(3, 6, seed=1), random(3, 6, seed=2)
    base, a = random(6, 6, seed=3), random(2, 6, seed=4).requires_grad_()

    def norms(b: torch.Tensor) -> tuple[float, float]:
        shifts = [((x @ (base + b @ a).T - x @ base.T).square()).mean(dim=1) for x in (x_w, x_l)]
        slopes = torch.autograd.grad(losses.alternative(*shifts, 2000.0, sign=sign).sum(), (a, b))
        return slopes[0].norm().item(), slopes[1].norm().item()

    assert norms(torch.zeros(6, 2, requires_grad=True)) == (0.0, 0.0)
    assert min(norms(torch.full((6, 2), 1e-2, requires_grad=True))) > 0
