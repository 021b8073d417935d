"""The pure mathematics: tensors of per-pair errors in, per-pair losses out, all in float32.

An error is the mean over c, h, w of (prediction − target)² for one image at one draw (t, ε); winner and loser of a
pair share the draw. β is the published code's: the mean is taken where the paper sums, and ½ stands in front, so
that `sum_form_beta` is the factor of the paper's squared norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def margin(
    error_winner: Float[Tensor, " pair"],
    error_loser: Float[Tensor, " pair"],
    ref_error_winner: Float[Tensor, " pair"],
    ref_error_loser: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """u = −(β/2)·[(e_w − ref_w) − (e_l − ref_l)]: the implicit reward of the winner less the loser's, for one draw.

    Positive where the policy prefers the winner more than the reference does; 0 where they are equal.
    Source: the argument of the sigmoid in eq. 46 of the supplement (eq. 14 of the paper with a constant weight).
    """
    gained = (error_winner.float() - ref_error_winner.float()) - (error_loser.float() - ref_error_loser.float())
    return -(beta / 2) * gained


def dpo(
    error_winner: Float[Tensor, " pair"],
    error_loser: Float[Tensor, " pair"],
    ref_error_winner: Float[Tensor, " pair"],
    ref_error_loser: Float[Tensor, " pair"],
    beta: float,
) -> Float[Tensor, " pair"]:
    """Diffusion-DPO: −log σ(u) with `margin`'s u; ln 2 where policy and reference agree (eq. 14, eq. 46)."""
    return -logsigmoid(margin(error_winner, error_loser, ref_error_winner, ref_error_loser, beta))


def sft(error_winner: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """Supervised fine-tuning on the winners: the denoising error itself (section 5.5 of the paper)."""
    return error_winner.float()


def sum_form_beta(beta: float, latent_shape: Sequence[int]) -> float:
    """β/(2·c·h·w): the factor of the *summed* squared errors, comparable across latent sizes and with the paper.

    Args:
        beta: as in the recipe.
        latent_shape: (c, h, w), e.g. (4, 64, 64) for a 512 pixel image of Stable Diffusion.
    """
    return beta / (2 * math.prod(latent_shape))
