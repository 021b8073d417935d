"""Families against the stock pipelines they stand for: conditioning, noise, prediction, decoding, pictures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Moments, NotFiniteError, geometry, uncropped
from lora_dpo.families.schedule import Schedule
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.models import save_random_sd, save_random_sdxl

# diffusers' Euler schedulers hand a tensor expression to np.array, which numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle", "", "zwei blaue Häuser, and far too many words to fit into sixteen tokens"]
# Of more kinds: scripts, composed and decomposed accents, emoji of several characters, white space, control characters.
WRITTEN = [
    *PROMPTS, " ", "  A  Red\tCircle \n", "красный круг", "赤い丸", "دائرة حمراء", "e\u0301 \u00e9",
    "\U0001f469\u200d\U0001f3a8", "a\u0000b", "<|endoftext|> inside", "a (red:1.3) [circle], {best}", "x" * 500,
]  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def sdxl_path(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("base") / "sdxl")


@pytest.fixture(scope="module")
def sd_path(tmp_path_factory):
    return save_random_sd(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="module")
def sdxl(sdxl_path):
    return SDXL(sdxl_path)


@pytest.fixture(scope="module")
def sd(sd_path):
    return StableDiffusion(sd_path)


@pytest.fixture(params=["sdxl", "sd"])
def family(request):
    return request.getfixturevalue(request.param)


def pixels(batch=2, size=64):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def noise(family, batch, size=64):
    shape = (batch, family.latent_channels, size // family.latent_scale, size // family.latent_scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# The schedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        BETAS,
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 400},
        {"beta_schedule": "squaredcos_cap_v2"},
        {**BETAS, "rescale_betas_zero_snr": True},
    ],
)
def test_the_schedule_is_diffusers_own(config, prediction):
    ours, theirs = Schedule({**config, "prediction_type": prediction}), DDPMScheduler(**config)
    t = torch.tensor([0, 1, 57, ours.num_timesteps - 1])
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 4, 4, 8, 8, generator=generator)
    assert ours.num_timesteps == theirs.config.num_train_timesteps
    torch.testing.assert_close(ours.add_noise(x_0, epsilon, t), theirs.add_noise(x_0, epsilon, t))
    expected = epsilon if prediction == "epsilon" else theirs.get_velocity(x_0, epsilon, t)
    torch.testing.assert_close(ours.target(x_0, epsilon, t), expected)


def test_an_error_in_v_times_the_weight_is_an_error_in_epsilon():
    schedule = Schedule({**BETAS, "prediction_type": "v_prediction"})
    t = torch.tensor([3, 500, 900])
    x_0, epsilon, error = torch.randn(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, v = schedule.add_noise(x_0, epsilon, t), schedule.target(x_0, epsilon, t) + error
    squared = schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    predicted = squared.sqrt() * v + (1 - squared).sqrt() * x_t
    in_epsilon = (predicted - epsilon).square().mean(dim=(1, 2, 3))
    in_v = error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(in_v * schedule.epsilon_weight(t), in_epsilon, rtol=1e-4, atol=1e-7)
    assert Schedule(BETAS).epsilon_weight(t).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prediction_type": "sample"}, "'sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ({"beta_schedule": "none such"}, "betas"),
    ],
)
def test_other_schedules_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        Schedule(config, where="here")


# Conditioning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sdxls_conditioning_is_the_stock_pipelines(sdxl_path, dtype):
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_path, dtype=getattr(torch, dtype))
    embeds, negative, pooled, negative_pooled = stock.encode_prompt(WRITTEN, device="cpu")
    ours = SDXL(sdxl_path, dtype=dtype).encode_prompts(WRITTEN)
    assert list(ours) == ["prompt_embeds", "pooled"]
    empty, others = [WRITTEN.index("")], [n for n, prompt in enumerate(WRITTEN) if prompt]
    for name, text, unconditional in (("prompt_embeds", embeds, negative), ("pooled", pooled, negative_pooled)):
        assert ours[name].dtype == text.dtype == getattr(torch, dtype)
        assert torch.equal(ours[name][others], text[others])
        # Nothing is a prompt for the picture and the absence of one for guidance; training means the latter.
        assert torch.equal(ours[name][empty], unconditional[empty])
        assert not ours[name][empty].any()


def test_without_forced_zeros_the_empty_prompt_is_encoded(sdxl_path, tmp_path):
    shutil.copytree(sdxl_path, tmp_path / "base")
    index = json.loads((tmp_path / "base/model_index.json").read_text())
    (tmp_path / "base/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    embeds, negative, pooled, negative_pooled = stock.encode_prompt("", device="cpu")
    ours = SDXL(tmp_path / "base").encode_prompts([""])
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(embeds, negative)
    assert embeds.any()
    assert torch.equal(ours["pooled"], pooled)
    assert torch.equal(pooled, negative_pooled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("version", "prediction_type"), [(1, "epsilon"), (2, "epsilon"), (2, "v_prediction")])
def test_stable_diffusions_conditioning_is_the_stock_pipelines(version, prediction_type, dtype, tmp_path):
    path = save_random_sd(tmp_path / "sd", version=version, prediction_type=prediction_type)
    stock = StableDiffusionPipeline.from_pretrained(path, dtype=getattr(torch, dtype))
    sd = StableDiffusion(path, dtype=dtype)
    embeds, negative = stock.encode_prompt(WRITTEN, "cpu", 1, True)
    ours = sd.encode_prompts(WRITTEN)
    assert list(ours) == ["prompt_embeds"]
    assert ours["prompt_embeds"].dtype == embeds.dtype == getattr(torch, dtype)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(embeds[WRITTEN.index("")], negative[0])
    assert sd.with_geometry(ours, uncropped(64, 64, len(WRITTEN))) is ours


def test_prompts_beyond_the_text_encoders_window_are_told(family):
    window = 16 - 2  # the random models' tokens, without start and end; one per letter
    fitting, cut = "x" * window, "x" * (window + 1)
    assert family.cut_prompts([fitting, cut, "", PROMPTS[2]]) == [cut, PROMPTS[2]]
    conditioning = family.encode_prompts([cut, cut + " and more"])
    for tensor in conditioning.values():
        assert torch.equal(tensor[0], tensor[1])
    assert family.cut_prompts([]) == []


def test_geometry_stands_in_sdxls_order(sdxl, sdxl_path):
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_path)
    expected = stock._get_add_time_ids((480, 640), (0, 11), (64, 72), torch.float32, text_encoder_projection_dim=16)
    conditioning = sdxl.encode_prompts(["p", "q"])
    made = sdxl.with_geometry(conditioning, geometry((480, 640), (0, 11), (64, 72), batch=2))
    assert torch.equal(made["time_ids"], expected.repeat(2, 1))
    assert "time_ids" not in conditioning
    assert uncropped(64, 72).tolist() == [[64, 72, 0, 0, 64, 72]]


# Pixels, latents, prediction


def test_latents_are_scaled_samples_and_decode_goes_back(family):
    moments = family.encode_images(pixels())
    posterior = family.folder.vae(family.device).encode(pixels() * 2 - 1).latent_dist
    assert torch.equal(moments.mean, posterior.mean)
    assert torch.equal(moments.std, posterior.std)
    epsilon = noise(family, 2)
    scale = family.folder.config("vae")["scaling_factor"]
    x_0 = family.latents(moments, epsilon)
    torch.testing.assert_close(x_0, (moments.mean + moments.std * epsilon) * scale)
    images = family.decode(x_0)
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    stock = family.folder.vae(family.device).decode(x_0 / scale).sample / 2 + 0.5
    torch.testing.assert_close(images, stock.clamp(0, 1))


def test_latent_means_and_deviations_of_the_vae_are_undone_in_decode(sd_path, tmp_path):
    shutil.copytree(sd_path, tmp_path / "base")
    config = json.loads((tmp_path / "base/vae/config.json").read_text())
    shift, spread = [1.0, -1.0, 0.5, 0.0], [2.0, 1.0, 0.5, 4.0]
    (tmp_path / "base/vae/config.json").write_text(
        json.dumps({**config, "latents_mean": shift, "latents_std": spread, "scaling_factor": 0.5})
    )
    family = StableDiffusion(tmp_path / "base")
    mean = torch.tensor(shift).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    std = torch.tensor(spread).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    x_0 = family.latents(Moments(mean, std), torch.ones(1, 4, 8, 8))
    assert torch.allclose(x_0, torch.full_like(x_0, 0.5))
    torch.testing.assert_close(
        family.decode(x_0), StableDiffusion(sd_path).decode((mean + std) * 0.18215), rtol=1e-4, atol=1e-5
    )


def test_moments_that_are_not_finite_are_an_error(sd_path):
    family = StableDiffusion(sd_path)
    spoilt = pixels(3)
    spoilt[1, 0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or infinite values for image 1 of the batch") as caught:
        family.encode_images(spoilt)
    assert caught.value.images == [1]
    assert "look at the picture, or name another VAE with base.vae" in str(caught.value)


def _with_weights(path, target, change):
    """A copy of the base whose VAE's weights went through `change`."""
    shutil.copytree(path, target)
    file = target / "vae/diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)
    return target


def test_a_vae_with_broken_weights_is_named_with_the_remedy(sdxl_path, tmp_path):
    broken = _with_weights(
        sdxl_path, tmp_path / "broken", lambda weights: weights | {"quant_conv.bias": torch.full((8,), float("inf"))}
    )
    with pytest.raises(NotFiniteError, match="for image 0, 1 of the batch") as caught:
        SDXL(broken).encode_images(pixels())
    assert "its weights have such values themselves (quant_conv.bias)" in str(caught.value)
    assert "madebyollin/sdxl-vae-fp16-fix" in str(caught.value)
    assert SDXL(broken, vae=sdxl_path).encode_images(pixels()).mean.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_vae_that_overflows_in_float16_encodes_and_decodes_in_float32(dtype, sdxl_path, tmp_path):
    """As SDXL's own does: its activations pass 65504, where normalisation brings them back in float32."""

    def loud(weights):
        return {
            name: tensor * (1e6 if name.endswith(("coder.conv_in.weight", "coder.conv_in.bias")) else 1)
            for name, tensor in weights.items()
        }

    path = _with_weights(sdxl_path, tmp_path / "loud", loud)
    config = path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": True}))
    vae = AutoencoderKL.from_pretrained(path / "vae")
    in_half = vae.half().encode(pixels().half() * 2 - 1).latent_dist.mean
    assert not in_half.isfinite().all()
    family = SDXL(path, dtype=dtype)
    moments = family.encode_images(pixels())
    stock = AutoencoderKL.from_pretrained(path / "vae").encode(pixels() * 2 - 1).latent_dist
    assert torch.equal(moments.mean, stock.mean)
    assert moments.mean.isfinite().all()
    assert family.decode(family.latents(moments, noise(family, 2))).isfinite().all()
    picture = family.pipeline()("p", num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert picture.isfinite().all()
    assert picture.std() > 0  # black pictures are what the overflow is known for


def test_prediction_is_the_unets_own(family):
    conditioning = family.with_geometry(family.encode_prompts(PROMPTS), uncropped(64, 64, 3))
    x_t, t = noise(family, 3), torch.tensor([0, 500, 999])
    unet = UNet2DConditionModel.from_pretrained(family.folder.path / "unet")
    added = (
        {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        if "pooled" in conditioning
        else None
    )
    expected = unet(x_t, t, conditioning["prompt_embeds"], added_cond_kwargs=added).sample
    predicted = family.predict(x_t, t, conditioning)
    assert torch.equal(predicted, expected)
    other = {**conditioning, "prompt_embeds": conditioning["prompt_embeds"].roll(1, 0)}
    assert not torch.allclose(family.predict(x_t, t, other), predicted)


def test_prediction_is_differentiable_and_the_denoiser_frozen(family):
    conditioning = family.with_geometry(family.encode_prompts(["p"]), uncropped(64, 64))
    x_0 = family.latents(family.encode_images(pixels(1)), noise(family, 1)).requires_grad_()
    family.predict(x_0, torch.tensor([10]), conditioning).square().mean().backward()
    assert x_0.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in family.denoiser.parameters())
    assert not family.denoiser.training
    assert family.denoiser is family.denoiser


def test_geometry_changes_sdxls_prediction_and_may_not_be_forgotten(sdxl):
    conditioning = sdxl.encode_prompts(["p"])
    x_t, t = noise(sdxl, 1), torch.tensor([500])
    small, large = (sdxl.with_geometry(conditioning, uncropped(size, size)) for size in (64, 1024))
    assert not torch.allclose(sdxl.predict(x_t, t, small), sdxl.predict(x_t, t, large))
    with pytest.raises(LoraDpoError, match="with_geometry"):
        sdxl.predict(x_t, t, conditioning)


# The pipeline


def test_the_pipeline_shares_the_denoiser_and_draws_the_stock_picture(family):
    kind = StableDiffusionXLPipeline if family.name == "sdxl" else StableDiffusionPipeline
    stock = kind.from_pretrained(family.folder.path)
    stock.set_progress_bar_config(disable=True)
    family.release_encoders()
    pipeline = family.pipeline()
    assert type(pipeline) is kind
    assert pipeline.unet is family.denoiser
    pictures = [
        made("a red circle", num_inference_steps=3, latents=noise(family, 1), output_type="pt").images
        for made in (stock, pipeline)
    ]
    assert torch.equal(*pictures)


def test_resolution_scale_and_channels_come_from_the_files(sdxl, sd):
    assert (sdxl.latent_scale, sdxl.resolution, sdxl.latent_channels) == (4, 64, 4)
    assert (sd.latent_scale, sd.resolution, sd.latent_channels) == (8, 64, 4)
    for family in (sdxl, sd):
        assert family.size_multiple == family.latent_scale * 2**family.denoiser.num_upsamplers


# Loading


def test_components_are_loaded_when_needed_and_released(sdxl_path, monkeypatch):
    family = SDXL(sdxl_path)
    loaded = []
    for name in ("vae", "unet", "text_encoder"):
        original = getattr(family.folder, name)

        def load(*arguments, name=name, original=original):
            loaded.append(name)
            return original(*arguments)

        monkeypatch.setattr(family.folder, name, load)
    assert loaded == []
    family.encode_prompts(["p"])
    family.encode_prompts(["p"])
    assert loaded == ["text_encoder", "text_encoder"]
    family.encode_images(pixels(1))
    assert loaded[2:] == ["vae"]
    family.release_encoders()
    family.encode_images(pixels(1))
    assert loaded[3:] == ["vae"]
    assert family.denoiser is family.denoiser
    assert loaded[4:] == ["unet"]


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_a_folder_stored_in_half_precision_computes_in_the_requested_dtype(name, tmp_path, request):
    path = request.getfixturevalue(f"{name}_path")
    kind, stock = (SDXL, StableDiffusionXLPipeline) if name == "sdxl" else (StableDiffusion, StableDiffusionPipeline)
    stock.from_pretrained(path).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    stock.from_pretrained(path).to(torch.float16).save_pretrained(tmp_path / "plain")
    for folder in ("half", "plain"):
        family = kind(tmp_path / folder)
        conditioning = family.with_geometry(family.encode_prompts(["p"]), uncropped(64, 64))
        assert {tensor.dtype for tensor in conditioning.values()} == {torch.float32}
        assert family.encode_images(pixels(1)).mean.dtype == torch.float32
        assert family.predict(noise(family, 1), torch.tensor([5]), conditioning).dtype == torch.float32
        assert family.pipeline()("p", num_inference_steps=1, output_type="pt").images.isfinite().all()
        assert kind(path).fingerprint()["unet"] != family.fingerprint()["unet"]


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_a_low_precision_denoiser_has_a_float32_vae_and_a_working_pipeline(name, request):
    kind = SDXL if name == "sdxl" else StableDiffusion
    family = kind(request.getfixturevalue(f"{name}_path"), dtype="bfloat16")
    conditioning = family.with_geometry(family.encode_prompts(["p"]), uncropped(64, 64))
    assert conditioning["prompt_embeds"].dtype == torch.bfloat16
    assert family.encode_images(pixels(1)).mean.dtype == torch.float32
    assert family.predict(noise(family, 1), torch.tensor([5]), conditioning).dtype == torch.bfloat16
    image = family.pipeline()("p", num_inference_steps=1, output_type="pt").images
    assert image.dtype == torch.float32
    assert image.isfinite().all()


def test_another_vae_takes_the_place_of_the_folders_own(sdxl_path, sd_path, tmp_path):
    other = save_random_sdxl(tmp_path / "other", seed=5)
    for given in (other, other / "vae"):
        family = SDXL(sdxl_path, vae=given)
        assert torch.equal(family.encode_images(pixels(1)).mean, SDXL(other).encode_images(pixels(1)).mean)
        assert family.fingerprint()["vae"] == SDXL(other).fingerprint()["vae"] != SDXL(sdxl_path).fingerprint()["vae"]
    with pytest.raises(UserError, match="no such VAE"):
        SDXL(sdxl_path, vae=tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match="no VAE here"):
        SDXL(sdxl_path, vae=tmp_path)


def test_fingerprints_follow_what_each_part_computes_with(sdxl_path, tmp_path):
    before = SDXL(sdxl_path).fingerprint()
    assert set(before) == {"vae", "text_encoders", "unet"}
    assert before == SDXL(sdxl_path).fingerprint()
    shutil.copytree(sdxl_path, tmp_path / "copy")
    assert SDXL(tmp_path / "copy").fingerprint() == before
    settings = tmp_path / "copy/tokenizer_2/tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    after = SDXL(tmp_path / "copy").fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"text_encoders"}
    assert SDXL(sdxl_path, dtype="float16").fingerprint()["text_encoders"] != before["text_encoders"]


def test_bases_that_are_not_there_or_do_not_fit(sdxl_path, sd_path, tmp_path):
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        SDXL(tmp_path / "none")
    with pytest.raises(UserError, match="neither a folder here nor to be had from the hub at revision 'v1'"):
        SDXL("nobody/nothing", revision="v1")
    with pytest.raises(UserError, match=r"no model_index\.json"):
        SDXL(sdxl_path / "unet")
    with pytest.raises(UserError, match=r"family 'sdxl'.*text_encoder_2"):
        SDXL(sd_path)
    with pytest.raises(UserError, match=r"family 'stable_diffusion'.*second text encoder"):
        StableDiffusion(sdxl_path)
    with pytest.raises(UserError, match="dtype"):
        SDXL(sdxl_path, dtype="int8")


def test_damaged_and_pickled_folders_are_explained(sd_path, tmp_path):
    def copy(name):
        return shutil.copytree(sd_path, tmp_path / name)

    weights = "unet/diffusion_pytorch_model.safetensors"
    broken = copy("broken")
    (broken / weights).write_bytes((broken / weights).read_bytes()[:1000])
    with pytest.raises(UserError, match="can't be loaded"):
        _ = StableDiffusion(broken).denoiser
    pickled = copy("pickled")
    (pickled / weights).rename(pickled / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        _ = StableDiffusion(pickled).denoiser
    garbled = copy("garbled")
    (garbled / "vae/config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        StableDiffusion(garbled)
    inpainting = copy("inpainting")
    config = json.loads((inpainting / "unet/config.json").read_text())
    (inpainting / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(UserError, match="9 channels"):
        StableDiffusion(inpainting)
