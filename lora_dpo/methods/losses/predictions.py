"""Losses that need more of the predictions than their errors against the reference, and the safeguard of losers.

A residual is prediction − target. All quantities are means over c, h, w per image, in one error space.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def mapo(
    error_winner: Float[Tensor, " pair"],
    error_loser: Float[Tensor, " pair"],
    *,
    beta: float = 0.1,
    snr: float = 0.5,
    timesteps: int = 1000,
) -> Float[Tensor, " pair"]:
    """MaPO (Hong et al. 2024): e_w − β·log σ(T·(φ(e_w) − φ(e_l))) with φ(e) = s·e/(exp(s·e) − 1). No reference.

    Both terms lower the winner's error; the second raises the loser's while the two are close.

    Args:
        beta: the weight of the second term; unlike DPO's it has no unit of errors.
        snr: s, one constant in the published code (`snr_value`).
        timesteps: T of the schedule.
    """
    winner, loser = error_winner.float(), error_loser.float()
    return winner - beta * logsigmoid(timesteps * (_log_odds(snr * winner) - _log_odds(snr * loser)))


def _log_odds(x: Tensor) -> Tensor:
    """x/(exp(x) − 1) for x ≥ 0, exact to float32 with its gradient.

    T multiplies a difference of two of these, near 1 each. exp(x) − 1 would lose all but a few digits where errors are
    small; expm1 has the value right but not the gradient, a difference of two terms of 1/x: hence the series
    Σ B_n·xⁿ/n! for x < ½, of which the next term is below 1e-10.
    """
    square = x * x
    series = 1 - x / 2 + square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
    large = x.clamp(min=0.5)
    return torch.where(x < 0.5, series, large / torch.expm1(large))


def dspo(
    error_winner: Float[Tensor, " pair"],
    ref_error_winner: Float[Tensor, " pair"],
    shift_winner: Float[Tensor, " pair"],
    u: Float[Tensor, " pair"],
    strength: float,
) -> Float[Tensor, " pair"]:
    """DSPO (Zhu et al. 2025): ‖r_w − k·(ε_θ − ε_ref)‖² of the winner, k = strength·(1 − σ(u)), as a mean over c, h, w.

    The squared norm of (1 − k)·r_θ + k·r_ref is (1 − k)·e + k·e_ref − k·(1 − k)·shift, so three scalars suffice. At
    θ = ref it is the winner's error: SFT that goes past the target, away from the reference, while a pair is undecided.

    Args:
        shift_winner: mean of (ε_θ − ε_ref)² for the winner.
        u: with its graph: as in the published code, the gradient goes through σ(u) too.
        strength: the published code for SD 1.5 takes one number, 0.001, for it and for the β of u, with which
            σ(u) = ½ to five digits: losers then have no influence. Its SDXL branch is another formula.
    """
    k = strength * torch.sigmoid(-u)
    return (1 - k) * error_winner.float() + k * ref_error_winner.float() - k * (1 - k) * shift_winner.float()


def safeguard(
    error_winner: Float[Tensor, " pair"], cross: Float[Tensor, " pair"], mu: float = 0.9
) -> Float[Tensor, " pair"]:
    """λ of Diffusion-SDPO (Fu et al. 2025): how much of the loser's gradient leaves the winner's error falling, 0 … 1.

    λ = min(1, (1 − μ)·‖r_w‖²/⟨r_l, r_w⟩) where the residuals point the same way, else 1: to first order, a step along
    the predictions' gradients then lowers the winner's error by at least μ of what it would without the loser. Per pair
    (the published code has one λ for its batch, so that a bad pair changes the others'), without a gradient.

    Args:
        cross: mean over c, h, w of r_w·r_l.
        mu: 0: the winner's error may stay the same; 1: no gradient from such losers. Published: 0.9 for SD 1.5, 0.6 for
            SDXL.
    """
    winner, cross = error_winner.detach().float(), cross.detach().float()
    bound = (1 - mu) * winner / cross.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(cross > 0, bound.clamp(max=1.0), torch.ones_like(bound))


def with_gradient_scaled(error: Float[Tensor, " pair"], by: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """The same values, of which the gradient is multiplied by `by`."""
    return error.detach() + by * (error - error.detach())


def alternative(
    shift_winner: Float[Tensor, " pair"], shift_loser: Float[Tensor, " pair"], beta: float, *, sign: int = -1
) -> Float[Tensor, " pair"]:
    """The alternative objective at the end of section S2: −log σ(±(β/2)·(‖ε_θ − ε_ref‖²_w − ‖ε_θ − ε_ref‖²_l)).

    Not for training: every gradient passes through ε_θ − ε_ref, which is exactly 0 where the policy is the reference,
    and that is where a LoRA starts (B = 0). It would stay there forever.

    Args:
        sign: −1 as in the supplement's last line; its derivation gives +1.
    """
    return -logsigmoid(sign * (beta / 2) * (shift_winner.float() - shift_loser.float()))
