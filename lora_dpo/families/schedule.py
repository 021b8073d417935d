"""The noise schedule of ε- and v-prediction models, read from a diffusers scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor

from lora_dpo.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Schedule:
    """x_t = α_t x_0 + σ_t ε with α_t² = `alphas_cumprod[t]`, σ_t² = 1 - α_t² [Diffusion-DPO, sec. 3; DDPM, Eq. 4].

    Attributes:
        num_timesteps: T; t runs from 0 (hardly any noise) to T - 1.
        prediction_type: "epsilon" or "v_prediction": the space of the denoiser's output and of `target`.
        alphas_cumprod: α_t² for each t, float32.
    """

    num_timesteps: int
    prediction_type: Literal["epsilon", "v_prediction"]
    alphas_cumprod: Float[Tensor, " T"]

    def __init__(self, config: Mapping[str, Any], *, device: torch.device | str = "cpu", where: object = None) -> None:
        """Raises UserError for flow matching and other predictions than ε and v."""
        if "FlowMatch" in str(config.get("_class_name", "")):
            raise UserError("flow-matching models have no ε or v schedule", where, "use an SD or SDXL base model")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type is {prediction_type!r}, supported: {', '.join(PREDICTION_TYPES)}",
                where,
                "use a base model that predicts ε or v",
            )
        # Samplers' configurations share the names of their betas, and DDPM's scheduler knows how to read them all.
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        betas = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
        try:
            self.alphas_cumprod = DDPMScheduler(**betas).alphas_cumprod.to(device=device, dtype=torch.float32)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"the scheduler's betas can't be used ({error})", where) from error
        self.num_timesteps = len(self.alphas_cumprod)
        self.prediction_type = prediction_type

    def add_noise(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t = α_t x_0 + σ_t ε."""
        alpha, sigma = self._alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * noise

    def target(
        self, x_0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What a perfect denoiser predicts: ε, or v = α_t ε - σ_t x_0 [progressive distillation, sec. 4]."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._alpha_sigma(t, x_0)
        return alpha * noise - sigma * x_0

    def epsilon_weight(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """A squared error in prediction space times this is one in ε-space.

        ε = α_t v + σ_t x_t, so at the same x_t an error Δv is an error α_t Δv of ε: the weight is α_t² for v, 1 for ε.
        """
        alphas = self.alphas_cumprod.to(t.device)[t]
        return torch.ones_like(alphas) if self.prediction_type == "epsilon" else alphas

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        squared = self.alphas_cumprod.to(like.device)[t.to(like.device)].view(-1, 1, 1, 1)
        return squared.sqrt().to(like.dtype), (1 - squared).sqrt().to(like.dtype)
