"""The implicit reward's difference u, what weighs it per timestep, and the units of β."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

TimestepWeight = Literal["constant", "elbo", "min_snr"]
MIN_SNR_GAMMA = 5.0


def margin(
    error_winner: Float[Tensor, " pair"],
    error_loser: Float[Tensor, " pair"],
    ref_error_winner: Float[Tensor, " pair"],
    ref_error_loser: Float[Tensor, " pair"],
    beta: float,
    weight: Float[Tensor, " pair"] | None = None,
) -> Float[Tensor, " pair"]:
    """u = −(β/2)·w(t)·[(e_w − ref_w) − (e_l − ref_l)]: the implicit reward of the winner less the loser's, at one draw.

    Positive where the policy prefers the winner more than the reference does; 0 where they are equal.
    Source: the argument of the sigmoid in eq. 46 of the supplement (eq. 14 of the paper with a constant weight).

    Args:
        weight: w(t) of each pair's timestep; it belongs here, inside of every loss of u, and not around the loss: only
            so is it the weight of a timestep in the sum that the implicit reward is. None: 1.
    """
    gained = (error_winner.float() - ref_error_winner.float()) - (error_loser.float() - ref_error_loser.float())
    u = -(beta / 2) * gained
    return u if weight is None else weight.to(u) * u


def timestep_weights(
    alphas_cumprod: Float[Tensor, " T"], kind: TimestepWeight, *, gamma: float = MIN_SNR_GAMMA
) -> Float[Tensor, " T"]:
    """w(t) of squared errors of ε, for t = 0 … T − 1, in float32.

    - constant: 1, as the paper trains (the ω of eq. 14 "can be constant").
    - elbo: T·ω(λ_t) = (T/2)·(SNR_{t−1}/SNR_t − 1), the weight of the evidence bound that eq. 13 sums over t. For the
      schedule of Stable Diffusion: 503 at t = 1, 3.28 at its lowest (t = 422), 6.1 at t = 999, 6.53 on average
      over t ≥ 1. t = 0 has no predecessor and is given the weight of t = 1; DDPM's own term there, the likelihood of
      x_0 with variance β_0, would have T/(2α_0²) = 500.
    - min_snr: min(SNR_t, γ)/SNR_t [Hang et al. 2023, sec. 3.4, for ε]: 1 at high noise, small where little is added.

    Where SNR_t = 0 (zero terminal SNR) an error in ε-space is 0 too, and so is the elbo weight.

    Args:
        alphas_cumprod: α_t² of the schedule.
        gamma: γ of min_snr.
    """
    squared = alphas_cumprod.double()
    snr = squared / (1 - squared)
    if kind == "constant":
        weights = torch.ones_like(snr)
    elif kind == "elbo":
        ratio = snr[:-1] / snr[1:]
        weights = len(snr) / 2 * torch.where(torch.isfinite(ratio), ratio - 1, 0.0)
        weights = torch.cat([weights[:1], weights])
    else:
        weights = torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
    return weights.float()


def sum_form_beta(beta: float, latent_shape: Sequence[int]) -> float:
    """β/(2·c·h·w): the factor of the *summed* squared errors, comparable across latent sizes and with the paper.

    Args:
        beta: as in the recipe.
        latent_shape: (c, h, w), e.g. (4, 64, 64) for a 512 pixel image of Stable Diffusion.
    """
    return beta / (2 * math.prod(latent_shape))


AUTO_BETA_TARGET, AUTO_BETA_DECAY = 0.2, 0.99
AUTO_BETA_RANGE = (100.0, 50_000.0)


def auto_beta(
    mean_gap: float, *, target: float = AUTO_BETA_TARGET, within: tuple[float, float] = AUTO_BETA_RANGE
) -> float:
    """The β at which a pair of average gap keeps `target` of its gradient: σ(−(β/2)·gap) = target.

    β = −2·logit(target)/mean |m|, with m = (ref_w − e_w) − (ref_l − e_l), whose mean is smoothed over steps (see
    `smoothed_gap`). Source: SimpleTuner's flow_dpo, where it is clamped to 0.001 … 1 for summed errors; the range here
    is of means over c, h, w.

    Args:
        mean_gap: smoothed mean of |m|; 0, as before the first step of a fresh LoRA, gives the largest β.
        target: of σ(−u), below ½.
    """
    low, high = within
    wanted = -2 * math.log(target / (1 - target))
    return high if mean_gap * high <= wanted else max(low, wanted / mean_gap)


def smoothed_gap(before: float, mean_gap: float, *, decay: float = AUTO_BETA_DECAY) -> float:
    """The exponential mean of the steps' mean |m|, 0 before the first one.

    It starts at the first one that isn't 0: a fresh LoRA is the reference, and counting its first step would hold the
    mean down, and β up, for the hundred steps that the mean remembers.
    """
    return mean_gap if before == 0 else decay * before + (1 - decay) * mean_gap
