"""Losses of a pair's margin u alone.

`label` is the probability that the winner is the better one: 1 for a plain pair, ½ for a tie. A label below 1 mixes the
loss with that of the pair turned round, label·ℓ(u) + (1 − label)·ℓ(−u), up to a constant.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_dpo.methods.losses.margins import margin

Label = float | Float[Tensor, " pair"]


def dpo(
    error_winner: Float[Tensor, " pair"],
    error_loser: Float[Tensor, " pair"],
    ref_error_winner: Float[Tensor, " pair"],
    ref_error_loser: Float[Tensor, " pair"],
    beta: float,
    weight: Float[Tensor, " pair"] | None = None,
) -> Float[Tensor, " pair"]:
    """Diffusion-DPO: −log σ(u) with `margin`'s u; ln 2 where policy and reference agree (eq. 14, eq. 46)."""
    return -logsigmoid(margin(error_winner, error_loser, ref_error_winner, ref_error_loser, beta, weight))


def cross_entropy(u: Float[Tensor, " pair"], label: Label = 1.0) -> Float[Tensor, " pair"]:
    """−label·log σ(u) − (1 − label)·log σ(−u): Diffusion-DPO for a label that may be uncertain.

    With `smoothed` labels this is conservative DPO (cDPO, Mitchell 2023), least at the finite margin logit(label); with
    `debiased` ones it is robust DPO (Chowdhury et al. 2024), whose labels are above 1.
    """
    return -logsigmoid(u) + (1 - label) * u  # −log σ(−u) = −log σ(u) + u


def smoothed(label: Label, rate: float) -> Label:
    """The label if a share `rate` of all labels is flipped by chance: label·(1 − rate) + (1 − label)·rate."""
    return label * (1 - 2 * rate) + rate


def debiased(label: Label, rate: float) -> Label:
    """The inverse of `smoothed`: with it the expected loss under flipped labels is that of the true ones.

    For label = 1, `cross_entropy` becomes [−(1 − ε)·log σ(u) + ε·log σ(−u)]/(1 − 2ε), the published form. Its gradient
    does not fade as u grows, and the loss has no lower bound: that is the price of being unbiased.

    Raises:
        ValueError: rate ≥ ½, from which nothing can be learned.
    """
    if not 0 <= rate < 0.5:
        raise ValueError(f"a share of flipped labels has to be in [0, 0.5), got {rate}")
    return (label - rate) / (1 - 2 * rate)


def ipo(u: Float[Tensor, " pair"], label: Label = 1.0) -> Float[Tensor, " pair"]:
    """IPO (Azar et al. 2023): (u − (label − ½))²; it regresses the margin on ½ where DPO would let it grow.

    In errors this is β²·(m/2 − 1/(2β))². The factor β² matters: without it the gradients are about 1e-8 at β = 5000,
    as small as AdamW's ε, and the adapter hardly moves.
    """
    return (u - (label - 0.5)).square()


def hinge(u: Float[Tensor, " pair"], label: Label = 1.0) -> Float[Tensor, " pair"]:
    """max(0, 1 − u) (SLiC, Zhao et al. 2023): a pair has no gradient any more once its margin is 1."""
    return label * (1 - u).relu() + (1 - label) * (1 + u).relu()


def dmpo(u: Float[Tensor, " pair"], alpha: float = 0.01, label: Label = 1.0) -> Float[Tensor, " pair"]:
    """DMPO (Li et al. 2025): KL(Bernoulli(σ(u)) ‖ Bernoulli(q)) with q = 1 − α, smoothed likewise for other labels.

    The reversed divergence: ∂/∂u = σ(u)·σ(−u)·(u − logit q), so that a pair that the policy has strongly wrong has
    little gradient, unlike in DPO, and the minimum is at logit q.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"α has to be in (0, 0.5), got {alpha}")
    q = smoothed(label, alpha)
    log_q, log_not_q = (q.log(), (1 - q).log()) if isinstance(q, Tensor) else (math.log(q), math.log1p(-q))
    return u.sigmoid() * (logsigmoid(u) - log_q) + (-u).sigmoid() * (logsigmoid(-u) - log_not_q)
