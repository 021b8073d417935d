"""What a base model offers to training: pixels → moments → latents, prompts → conditioning, and its prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_dpo.errors import UserError
from lora_dpo.families.schedule import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Conditioning = dict[str, Tensor]


class Moments(NamedTuple):
    """The VAE's posterior of a batch of images, unscaled, float32 [b, c, h, w]."""

    mean: Tensor
    std: Tensor


class NotFiniteError(UserError):
    """Moments with NaN or infinite values.

    Attributes:
        images: their places in the batch.
    """

    def __init__(self, images: Sequence[int], where: object, hint: str) -> None:
        self.images = list(images)
        places = ", ".join(map(str, self.images))
        super().__init__(f"the VAE's moments have NaN or infinite values for image {places} of the batch", where, hint)


def geometry(
    original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int], batch: int = 1
) -> Int[Tensor, "b 6"]:
    """(height, width) of the original, (top, left) of the crop in the scaled picture, (height, width) of the result."""
    return torch.tensor([[*original, *crop, *target]]).repeat(batch, 1)


def uncropped(height: int, width: int, batch: int = 1) -> Int[Tensor, "b 6"]:
    """The geometry of pictures made at this size: what pipelines assume when they sample."""
    return geometry((height, width), (0, 0), (height, width), batch)


class Family(ABC):
    """A base model behind one face. Not an nn.Module: it holds the denoiser, it doesn't own its state dict.

    Attributes:
        name: as in the recipe's `family =`.
        schedule: of the noise, on `device`.
        latent_scale: pixels per latent cell, along each side.
        size_multiple: pixels; the denoiser halves sides that are multiples of it evenly, down to its middle.
        latent_channels: of x_t.
        resolution: pixels of the square that the model was made for.
        dtype: of the denoiser's weights and of the conditioning; the VAE stays in float32.
    """

    name: str
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    latent_scale: int
    size_multiple: int
    latent_channels: int
    resolution: int

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The frozen network that predicts; loaded on first use, then always the same object."""

    @abstractmethod
    def encode_images(self, pixels: Float[Tensor, "b 3 H W"]) -> Moments:
        """The posterior of pictures in [0, 1], computed in float32; NotFiniteError if it isn't finite."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Batch-first tensors, as the family's stock pipeline computes them; "" is its unconditional embedding."""

    @abstractmethod
    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those of them that are too long for the text encoders, which read no more than their beginnings."""

    @abstractmethod
    def with_geometry(self, conditioning: Conditioning, geometry: Int[Tensor, "b 6"]) -> Conditioning:
        """The conditioning with the pictures' sizes and crops, where the model looks at them."""

    @abstractmethod
    def latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """x_0: a sample of the posterior, mean + std · noise, scaled as the denoiser wants it."""

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The denoiser's output in its own dtype, in the space of `schedule.target`; differentiable."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1], float32."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Frees the VAE and the text encoders; they are loaded again when needed."""

    @abstractmethod
    def release(self) -> None:
        """Frees every network; they are loaded again, as their files have them, when needed."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """The stock diffusers pipeline around the same `denoiser` object."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Content digests of what "vae", "text_encoders" and "unet" compute with."""
