"""One draw (t, ε) → the denoising error of each image, under whichever adapters are switched on."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from lora_dpo.families import Conditioning, Family

ErrorSpace = Literal["epsilon", "prediction"]


def errors(
    family: Family,
    x_0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    conditioning: Conditioning,
    error_space: ErrorSpace = "epsilon",
) -> Float[Tensor, " b"]:
    """mean over c, h, w of (prediction − target)², in float32.

    Args:
        x_0: scaled latents.
        noise: ε, one per image; a pair's images are given the same.
        t: timesteps, 0 … num_timesteps − 1.
        conditioning: batch-first, complete with geometry where the family needs it.
        error_space: "epsilon" multiplies by the schedule's weight, so that an error (and β) means the same for ε- and
            v-prediction (the ε-space error is ᾱ_t times the v-space error); "prediction" leaves it as it is.
    """
    residual = residuals(family, x_0, noise, t, conditioning)
    return mean_product(family, residual, residual, t, error_space)


def residuals(
    family: Family,
    x_0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    conditioning: Conditioning,
) -> Float[Tensor, "b c h w"]:
    """prediction − target, in float32 and in the space of the model's predictions; arguments as for `errors`."""
    x_t = family.schedule.add_noise(x_0, noise, t)
    target = family.schedule.target(x_0, noise, t)
    return family.predict(x_t, t, conditioning).float() - target.float()


def mean_product(
    family: Family,
    one: Float[Tensor, "b c h w"],
    other: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    error_space: ErrorSpace = "epsilon",
) -> Float[Tensor, " b"]:
    """mean over c, h, w of the product of residuals, or of their differences: an error, where both are the same.

    Differences of predictions at the same x_t convert to ε-space as errors do: by ᾱ_t for v-prediction.
    """
    product = (one.square() if one is other else one * other).mean(dim=(1, 2, 3))
    return product * family.schedule.epsilon_weight(t).to(product) if error_space == "epsilon" else product
