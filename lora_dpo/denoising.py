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
    x_t = family.schedule.add_noise(x_0, noise, t)
    target = family.schedule.target(x_0, noise, t)
    error = (family.predict(x_t, t, conditioning).float() - target.float()).square().mean(dim=(1, 2, 3))
    return error * family.schedule.epsilon_weight(t).to(error) if error_space == "epsilon" else error
