"""What Stable Diffusion and SDXL share: a KL autoencoder, a conditional UNet, and loading in phases."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTokenizer

from lora_dpo.errors import UserError
from lora_dpo.families import Family, Moments, NotFiniteError, quantized
from lora_dpo.families.files import ModelFiles, frozen
from lora_dpo.families.folder import PipelineFolder
from lora_dpo.families.schedule import Schedule
from lora_dpo.families.single_file import SUFFIX, SingleFile

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
# The default of diffusers, whose configurations leave out what is SD 1.x's.
DOWN_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UNetFamily(Family):
    """A base model with a UNet. Nothing but its configurations is read before it is needed.

    Args:
        base: a diffusers folder, a hub id, or a checkpoint that is one .safetensors file; or its files, opened.
        revision: of the hub id: branch, tag or commit.
        vae: another VAE: folder, hub id, or .safetensors file.
        config: for a single file: a diffusers folder or hub id with its configurations and tokenizers.
        prediction_type: "epsilon" or "v_prediction", in place of what the model's files say.
        dtype: of the denoiser and the text encoders: "float32", "bfloat16" or "float16".
        quantization: of the denoiser's large linear layers: "none", "int8" or "nf4"; see `quantized`.
        device: where everything is computed.

    Raises:
        UserError: a base that isn't there, isn't of this family, or can't be trained this way (inpainting, depth).
    """

    components: tuple[str, ...]
    text_components: tuple[str, ...]

    def __init__(
        self,
        base: Path | str | ModelFiles,
        *,
        revision: str | None = None,
        vae: Path | str | None = None,
        config: Path | str | None = None,
        prediction_type: str | None = None,
        dtype: str = "float32",
        quantization: quantized.Kind = "none",
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}", "dtype", f"one of {', '.join(DTYPES)}")
        opened = isinstance(base, ModelFiles)
        self.folder = base if opened else _files(base, revision, vae, config, prediction_type)
        self.dtype, self.device = DTYPES[dtype], torch.device(device)
        self.quantization: quantized.Kind = quantization
        if quantization != "none":
            quantized.require()
        self._check_kind()
        self._vae_config, unet = self.folder.config("vae"), self.folder.config("unet")
        self.latent_channels = int(self._vae_config.get("latent_channels", 4))
        if unet.get("in_channels", 4) != self.latent_channels:
            raise UserError(
                f"the denoiser takes {unet.get('in_channels')} channels and the VAE gives {self.latent_channels}",
                self.folder.path,
                "inpainting, depth and other image-conditioned models can't be trained on preferences",
            )
        self.latent_scale = 2 ** (len(self._vae_config.get("block_out_channels", (64,))) - 1)
        halvings = len(unet.get("down_block_types", DOWN_BLOCKS)) - 1  # every block but the last ends in one
        self.size_multiple = self.latent_scale * 2**halvings
        self.resolution = int(unet.get("sample_size") or 64) * self.latent_scale
        self.schedule = Schedule(self.folder.config("scheduler"), device=self.device, where=self.folder.path)
        self._unet: UNet2DConditionModel | None = None
        self._vae: Any = None
        self._texts: list[tuple[CLIPTokenizer, Any]] | None = None
        self._fingerprint: dict[str, str] | None = None

    @abstractmethod
    def _load_texts(self) -> list[tuple[CLIPTokenizer, Any]]:
        """The text encoders with their tokenizers, in the pipeline's order."""

    @property
    @final
    def denoiser(self) -> UNet2DConditionModel:
        if self._unet is None:
            self._unet = self._load_unet()
        return self._unet

    def _load_unet(self) -> UNet2DConditionModel:
        if self.quantization == "none":
            return self.folder.unet(self.dtype, self.device)
        # Layer by layer onto the device: the whole of it may be more than that has room for.
        unet = self.folder.unet(self.dtype, torch.device("cpu"))
        quantized.quantize(unet, self.quantization, self.device)
        return frozen(unet, self.device)

    @final
    def encode_images(self, pixels: Float[Tensor, "b 3 H W"]) -> Moments:
        with torch.no_grad():
            posterior = self._autoencoder().encode(pixels.to(self.device, torch.float32) * 2 - 1).latent_dist
        moments = Moments(posterior.mean, posterior.std)
        finite = torch.stack([part.isfinite().flatten(1).all(dim=1) for part in moments]).all(dim=0)
        if not finite.all():
            raise NotFiniteError((~finite).nonzero().flatten().tolist(), self.folder.path, self._why_not_finite())
        return moments

    @final
    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        cut: set[int] = set()
        for component in self.text_components:
            if component.startswith("tokenizer"):
                tokenizer = self.folder.tokenizer(component)
                for start in range(0, len(prompts), 4096):
                    ids = tokenizer(list(prompts[start : start + 4096]), verbose=False)["input_ids"]
                    cut |= {start + i for i, row in enumerate(ids) if len(row) > tokenizer.model_max_length}
        return [prompts[index] for index in sorted(cut)]

    @final
    def latents(self, moments: Moments, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        shift, scale = self._affine(moments.mean)
        return (moments.mean + moments.std * noise - shift) * scale

    @final
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        latents = latents.to(self.device, torch.float32)
        shift, scale = self._affine(latents)
        with torch.no_grad():
            images = self._autoencoder().decode(latents / scale + shift).sample
        return (images / 2 + 0.5).clamp(0, 1)

    @final
    def release_encoders(self) -> None:
        self._vae = self._texts = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @final
    def release(self) -> None:
        self._unet = None
        self.release_encoders()

    @final
    def fingerprint(self) -> dict[str, str]:
        if self._fingerprint is None:
            self._fingerprint = {
                "vae": self.folder.digest("vae"),
                # The conditioning is stored in the dtype in which it is computed.
                "text_encoders": f"{self.folder.digest(*self.text_components)}-{str(self.dtype).split('.')[-1]}",
                "unet": self.folder.digest("unet"),
            }
        return dict(self._fingerprint)

    def _check_kind(self) -> None:
        missing = [name for name in self.components if not self.folder.has(name) and name != "vae"]
        second = "text_encoder_2" in self.folder.index and "text_encoder_2" not in self.components
        if missing or second:
            kind = self.folder.index.get("_class_name", "an unknown pipeline")
            problem = f"it has no {', '.join(missing)}" if missing else "it has a second text encoder"
            raise UserError(
                f"not a base model of family {self.name!r}: {problem} (it is {kind})",
                self.folder.path,
                'choose the family that fits: SDXL models are "sdxl", SD 1.x and 2.x are "stable_diffusion"',
            )

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale) of x_0 = (z - shift) · scale, from the VAE's configuration."""
        scaling = float(self._vae_config.get("scaling_factor", 0.18215))
        mean, std = self._vae_config.get("latents_mean"), self._vae_config.get("latents_std")
        if mean is None or std is None:
            return 0.0, scaling
        return like.new_tensor(mean).view(1, -1, 1, 1), scaling / like.new_tensor(std).view(1, -1, 1, 1)

    def _autoencoder(self) -> Any:
        if self._vae is None:
            self._vae = self.folder.vae(self.device)
            first = self._vae.post_quant_conv if self._vae.post_quant_conv is not None else self._vae.decoder
            # Pipelines hand over latents in the denoiser's dtype, and this VAE stays in float32.
            first.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
        return self._vae

    def _why_not_finite(self) -> str:
        other = "name another VAE with base.vae (for SDXL: madebyollin/sdxl-vae-fp16-fix)"
        spoilt = [name for name, tensor in self._autoencoder().state_dict().items() if not tensor.isfinite().all()]
        if spoilt:
            return f"its weights have such values themselves ({spoilt[0]}): download it again, or {other}"
        return f"it computes in float32, so float16 is not the cause: look at the picture, or {other}"

    def _encoders(self) -> list[tuple[CLIPTokenizer, Any]]:
        if self._texts is None:
            self._texts = self._load_texts()
        return self._texts

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: list[str]) -> dict[str, Tensor]:
        """Input ids and attention mask [b, tokens], padded and cut to the encoder's length."""
        encoded = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _finished(self, pipeline: Pipeline) -> Pipeline:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _files(
    base: Path | str,
    revision: str | None,
    vae: Path | str | None,
    config: Path | str | None,
    prediction_type: str | None,
) -> ModelFiles:
    if str(base).endswith(SUFFIX) and not Path(base).is_dir():
        return SingleFile(base, config=config, revision=revision, vae=vae, prediction_type=prediction_type)
    if config is not None:
        raise UserError("only a single-file checkpoint takes a config", config, "a folder has its own")
    return PipelineFolder(base, revision=revision, vae=vae, prediction_type=prediction_type)
