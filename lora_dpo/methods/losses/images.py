"""Losses of single images: SFT, KTO, and terms that hold the winners' errors down beside a loss of pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sft(error_winner: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Supervised fine-tuning on the winners: the denoising error itself (section 5.5 of the paper)."""
    return error_winner.float()


def sft_term(error_winner: Float[Tensor, " pair"], beta: float) -> Float[Tensor, " pair"]:
    """(β/2)·e_w: the winners' error in the units of u, so that a weight of it means the same at every β.

    At weight 1 it pulls a winner's error down as hard as DPO does at most.
    """
    return beta / 2 * error_winner.float()


def anchor_term(
    error_winner: Float[Tensor, " pair"], ref_error_winner: Float[Tensor, " pair"], beta: float
) -> Float[Tensor, " pair"]:
    """(β/2)·max(0, e_w − ref_w): what the winners lose against the reference, in the units of u.

    DPO sees differences only, and lets both errors rise as long as the loser's rises more. Source: the penalty of
    DPO-Positive (Pal et al. 2024), which has it inside the sigmoid, where it fades as u grows; here it doesn't.
    """
    return beta / 2 * (error_winner.float() - ref_error_winner.float()).relu()


def kto(
    gain: Float[Tensor, " image"],
    desirable: Bool[Tensor, " image"],
    reference_point: Float[Tensor, ""] | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " image"]:
    """Diffusion-KTO (Li et al. 2024): λ_y·(1 − σ(±(β/2)·(g − z))), + for desirable images, − for the others.

    Half of the weight where policy and reference agree; a gain is worth most near the reference point.

    Args:
        gain: g = e_ref − e of each image at its own draw.
        reference_point: z, see `reference_point`; no gradient is taken through it.
        beta: in DPO's unit; the published code has β·g with β = 1000, which is 2000 here.
        desirable_weight, undesirable_weight: λ_y.
    """
    z = reference_point.detach() if isinstance(reference_point, Tensor) else reference_point
    sign = torch.where(desirable, 1.0, -1.0).to(gain.device)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain.device)
    return weight * torch.sigmoid(-sign * (beta / 2) * (gain.float() - z))


def reference_point(mean_gain: float) -> float:
    """z = max(0, mean of g) over *all* images of an optimizer step: the batch's estimate of the KL divergence.

    The mean is clamped, not its parts: those of micro-batches and processes have to be added up first.
    """
    return max(0.0, mean_gain)
