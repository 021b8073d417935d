"""The pure mathematics: tensors of per-pair errors in, per-pair losses out, all in float32.

An error is the mean over c, h, w of (prediction − target)² for one image at one draw (t, ε); winner and loser of a
pair share the draw. β is the published code's: the mean is taken where the paper sums, and ½ stands in front, so
that `sum_form_beta` is the factor of the paper's squared norms. It means this in every loss that has the margin u.
"""

from lora_dpo.methods.losses.images import anchor_term, kto, reference_point, sft, sft_term
from lora_dpo.methods.losses.margins import (
    AUTO_BETA_DECAY,
    AUTO_BETA_RANGE,
    AUTO_BETA_TARGET,
    MIN_SNR_GAMMA,
    TimestepWeight,
    auto_beta,
    margin,
    smoothed_gap,
    sum_form_beta,
    timestep_weights,
)
from lora_dpo.methods.losses.pairwise import Label, cross_entropy, debiased, dmpo, dpo, hinge, ipo, smoothed
from lora_dpo.methods.losses.predictions import alternative, dspo, mapo, safeguard, with_gradient_scaled

__all__ = [
    "AUTO_BETA_DECAY",
    "AUTO_BETA_RANGE",
    "AUTO_BETA_TARGET",
    "MIN_SNR_GAMMA",
    "Label",
    "TimestepWeight",
    "alternative",
    "anchor_term",
    "auto_beta",
    "cross_entropy",
    "debiased",
    "dmpo",
    "dpo",
    "dspo",
    "hinge",
    "ipo",
    "kto",
    "mapo",
    "margin",
    "reference_point",
    "safeguard",
    "sft",
    "sft_term",
    "smoothed",
    "smoothed_gap",
    "sum_form_beta",
    "timestep_weights",
    "with_gradient_scaled",
]
