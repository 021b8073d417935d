"""Single-file checkpoints against the diffusers folders with the same weights, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_dpo.errors import UserError
from lora_dpo.families import Moments, clip, uncropped
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.single_file import SingleFile
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.models import save_random_sd, save_random_sdxl
from tests.support.single_file import save_single_file, vae_names

PROMPTS = ["a red circle!", "", "far too many words to fit into sixteen tokens"]
KINDS = {"sd15": StableDiffusion, "sd21_base": StableDiffusion, "sd21_v": StableDiffusion, "sdxl": SDXL}
PREDICTIONS = {"sd21_base": "epsilon", "sd21_v": "v_prediction"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name → (diffusers folder, file)"""
    root = tmp_path_factory.mktemp("bases")
    folders = {
        "sd15": save_random_sd(root / "sd15"),
        "sd21_base": save_random_sd(root / "sd21_base", version=2, seed=1),
        "sd21_v": save_random_sd(root / "sd21_v", version=2, prediction_type="v_prediction", seed=2),
        "sdxl": save_random_sdxl(root / "sdxl"),
    }
    return {name: (folder, save_single_file(folder, root / f"{name}.safetensors")) for name, folder in folders.items()}


@pytest.fixture(params=KINDS)
def pair(request, bases):
    """The same model twice: from its folder and from one file, with the settings of a folder without weights."""
    name = request.param
    folder, file = bases[name]
    settings = folder.with_name(f"{name}-settings")
    if not settings.exists():
        shutil.copytree(folder, settings, ignore=shutil.ignore_patterns("*.safetensors"))
    return KINDS[name](folder), KINDS[name](file, config=settings)


def noise(family, batch):
    side = 64 // family.latent_scale
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(1))


def test_a_file_computes_what_its_folder_does(pair):
    folder, file = pair
    assert type(file.folder) is SingleFile
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(file.encode_images(pixels), folder.encode_images(pixels), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = file.encode_prompts(PROMPTS), folder.encode_prompts(PROMPTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    conditioning = folder.with_geometry(theirs, uncropped(64, 64, 3))
    t = torch.tensor([0, 500, 999])
    assert torch.equal(file.predict(noise(file, 3), t, conditioning), folder.predict(noise(folder, 3), t, conditioning))
    moments = folder.encode_images(pixels)
    assert torch.equal(file.latents(moments, noise(file, 2)), folder.latents(moments, noise(folder, 2)))
    assert file.schedule.prediction_type == folder.schedule.prediction_type
    assert torch.equal(file.schedule.alphas_cumprod, folder.schedule.alphas_cumprod)
    assert file.resolution == folder.resolution


@pytest.mark.parametrize("pair", ["sd21_v", "sdxl"], indirect=True)
def test_a_file_draws_the_picture_of_its_folder(pair):
    pictures = [
        family.pipeline()("a red circle", num_inference_steps=1, latents=noise(family, 1), output_type="pt").images
        for family in pair
    ]
    assert torch.equal(*pictures)


def test_a_half_precision_file_computes_in_the_requested_dtype(bases, tmp_path, caplog):
    folder, _ = bases["sdxl"]
    file = save_single_file(folder, tmp_path / "half.safetensors", dtype=torch.float16)
    for dtype in ("float32", "bfloat16"):
        family = SDXL(file, config=folder, dtype=dtype)
        assert {parameter.dtype for parameter in family.denoiser.parameters()} == {family.dtype}
        conditioning = family.encode_prompts(PROMPTS)
        assert {tensor.dtype for tensor in conditioning.values()} == {family.dtype}
        assert family.encode_images(torch.rand(1, 3, 64, 64)).mean.dtype == torch.float32
    assert caplog.text == ""  # diffusers warns of casts


def test_another_vae_takes_the_files_place(bases, tmp_path):
    folder, file = bases["sdxl"]
    other = save_random_sdxl(tmp_path / "other", seed=5)
    pixels = torch.rand(1, 3, 64, 64)
    family = SDXL(file, config=folder, vae=other)
    assert torch.equal(family.encode_images(pixels).mean, SDXL(other).encode_images(pixels).mean)
    assert family.fingerprint()["vae"] == SDXL(other).fingerprint()["vae"]


def vae_files(folder: Path, root: Path, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """A folder's VAE as people have it in one file."""
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    original = vae_names(weights)
    kinds = {
        "original": original | {"loss.discriminator.weight": torch.zeros(3)},
        "prefixed": {f"first_stage_model.{name}": tensor for name, tensor in original.items()},
        "diffusers": weights,
    }
    for kind, tensors in kinds.items():
        save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, root / f"{kind}.safetensors")
    return {kind: root / f"{kind}.safetensors" for kind in kinds}


@pytest.mark.parametrize("base", ["folder", "file"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_vae_in_one_file_takes_the_bases_settings(name, base, bases, tmp_path, caplog):
    folder, file = bases[name]
    save = save_random_sdxl if name == "sdxl" else save_random_sd
    other = save(tmp_path / "other", seed=5)
    model, options = (folder, {}) if base == "folder" else (file, {"config": folder})
    own = KINDS[name](model, **options)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = KINDS[name](folder, vae=other / "vae").encode_images(pixels)
    assert not torch.equal(expected.mean, own.encode_images(pixels).mean)
    seen = {own.fingerprint()["vae"]}
    for kind, path in (
        vae_files(other, tmp_path) | {"whole": save_single_file(other, tmp_path / "w.safetensors")}
    ).items():
        family = KINDS[name](model, vae=path, **options)
        for ours, theirs in zip(family.encode_images(pixels), expected, strict=True):
            assert torch.equal(ours, theirs), kind
        assert family.folder.config("vae") == own.folder.config("vae")
        latents = family.latents(Moments(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)), torch.zeros(1, 4, 8, 8))
        assert latents.unique().item() == pytest.approx(0.13025 if name == "sdxl" else 0.18215)
        seen.add(family.fingerprint()["vae"])
        assert family.fingerprint()["unet"] == own.fingerprint()["unet"]
    assert len(seen) == 4  # "prefixed" and "whole" have the same tensors under the same names
    half = vae_files(other, tmp_path, torch.float16)["original"]
    family = KINDS[name](model, vae=half, **options)
    assert next(family._autoencoder().parameters()).dtype == torch.float32
    assert family.fingerprint()["vae"] not in seen
    assert caplog.records == []


def test_a_vae_file_that_is_none_or_does_not_fit(bases, tmp_path):
    folder, file = bases["sdxl"]
    with pytest.raises(UserError, match="no such checkpoint"):
        SDXL(folder, vae=tmp_path / "none.safetensors")
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block.lora_up.weight": torch.zeros(1)}, lora)
    with pytest.raises(UserError, match="no VAE in this file"):
        SDXL(folder, vae=lora)
    (path, *_) = vae_files(bases["sd15"][0], tmp_path).values()  # four levels in place of three
    with pytest.raises(UserError, match=r"the base model's own lacks(.|\n)*same architecture") as caught:
        SDXL(folder, vae=path).encode_images(torch.rand(1, 3, 64, 64))
    assert str(path) in str(caught.value)
    wide = {k: t.repeat(2, 1, 1, 1) if k == "encoder.conv_in.weight" else t for k, t in load_file(path).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"shape(.|\n)*same architecture"):
        StableDiffusion(bases["sd15"][0], vae=tmp_path / "wide.safetensors").encode_images(torch.rand(1, 3, 64, 64))
    tensors = load_file(vae_files(folder, tmp_path)["original"])
    save_file({name: t for name, t in tensors.items() if name != "decoder.conv_in.bias"}, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"lacks tensors(.|\n)*same architecture"):
        SDXL(file, config=folder, vae=tmp_path / "cut.safetensors").encode_images(torch.rand(1, 3, 64, 64))


def test_the_fingerprint_follows_each_components_tensors(bases, tmp_path):
    folder, file = bases["sdxl"]
    before = SDXL(file, config=folder).fingerprint()
    assert SDXL(shutil.copy(file, tmp_path / "copy.safetensors"), config=folder).fingerprint() == before
    for component, name in (
        ("vae", "first_stage_model.quant_conv.bias"),
        ("unet", "model.diffusion_model.out.2.bias"),
        ("text_encoders", "conditioner.embedders.1.model.ln_final.bias"),
    ):
        tensors = load_file(file)
        tensors[name] = tensors[name] + 1
        save_file(tensors, tmp_path / "changed.safetensors")
        after = SDXL(tmp_path / "changed.safetensors", config=folder).fingerprint()
        assert {part for part in before if before[part] != after[part]} == {component}
    assert SDXL(file).fingerprint()["text_encoders"] != before["text_encoders"]  # other settings, other vocabulary


# What an SD 2.x model predicts


def test_an_sd2_file_needs_to_be_told_what_it_predicts(bases):
    _, file = bases["sd21_v"]
    with pytest.raises(UserError, match="predicts ε or v") as caught:
        StableDiffusion(file)
    assert "base.prediction_type" in str(caught.value)
    for given, size in (("epsilon", 512), ("v_prediction", 768)):
        family = StableDiffusion(file, prediction_type=given)
        assert (family.schedule.prediction_type, family.resolution) == (given, size)
        assert family.folder.scheduler().config.prediction_type == given


def test_a_files_own_marks_are_heeded(bases, tmp_path):
    folder, file = bases["sd21_v"]
    named = save_single_file(folder, tmp_path / "named.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert StableDiffusion(named).schedule.prediction_type == "v_prediction"
    assert StableDiffusion(named, prediction_type="epsilon").schedule.prediction_type == "epsilon"
    _, file = bases["sdxl"]
    assert SDXL(file).schedule.prediction_type == "epsilon"
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(load_file(file) | marks, tmp_path / "marked.safetensors")
    family = SDXL(tmp_path / "marked.safetensors")
    assert family.schedule.prediction_type == "v_prediction"
    assert family.schedule.alphas_cumprod[-1].abs() < 1e-6  # no signal at the last timestep
    assert family.folder.scheduler().config.rescale_betas_zero_snr


@pytest.mark.parametrize("name", ["sd21_v", "sdxl"])
def test_a_recipes_prediction_type_overrides_a_folders(name, bases):
    folder, _ = bases[name]
    for given in ("epsilon", "v_prediction"):
        family = KINDS[name](folder, prediction_type=given)
        assert family.schedule.prediction_type == given
        assert family.pipeline().scheduler.config.prediction_type == given


# The originals' own settings


@pytest.mark.parametrize(
    ("name", "parameters", "texts"),
    [
        ("sd15", 859_520_964, {"text_encoder": 123_060_480}),
        ("sd21_v", 865_910_724, {"text_encoder": 340_387_840}),
        ("sdxl", 2_567_463_684, {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840}),
    ],
)
def test_without_a_folder_the_settings_are_the_originals(name, parameters, texts, bases):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    files = SingleFile(bases[name][1], prediction_type=PREDICTIONS.get(name))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**files.config("unet"))
        vae = AutoencoderKL(**files.config("vae"))
        for component, count in texts.items():
            kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
            encoder = kind(CLIPTextConfig(**files.config(component)))
            assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert files.config("vae")["scaling_factor"] == (0.13025 if name == "sdxl" else 0.18215)
    family = (SDXL if name == "sdxl" else StableDiffusion)(bases[name][1], prediction_type=PREDICTIONS.get(name))
    assert family.size_multiple == 8 * 2**unet.num_upsamplers == (32 if name == "sdxl" else 64)


def test_clips_tokenizer_is_here():
    words = clip.tokenizer(clip.END)
    assert len(words) == 49408
    assert words("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    # From OpenAI's own tokenizer.
    assert words("A photo of a cat,  trending on artstation!!")["input_ids"][6:-1] == [267, 6087, 525, 1486, 2631, 748]
    padded = clip.tokenizer("!")("cat", padding="max_length")["input_ids"]
    assert (len(padded), padded[:3], set(padded[3:])) == (77, [49406, 2368, 49407], {0})


# What can't be read


def test_files_of_another_size_say_what_to_do(bases):
    _, file = bases["sd15"]
    family = StableDiffusion(file)
    for compute in (
        lambda: family.denoiser,
        lambda: family.encode_prompts(["p"]),
        lambda: family.encode_images(torch.rand(1, 3, 64, 64)),
    ):
        with pytest.raises(UserError) as caught:
            compute()
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "an SD3 model"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "a LoRA"),
        ("encoder.down.0.block.0.conv1.weight", "base.vae"),
        ("down_blocks.0.resnets.0.conv1.weight", "the pipeline's whole folder"),
        ("something.else", "no text encoder"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "has no unet"),
    ],
)
def test_other_files_are_called_by_their_names(name, said, tmp_path):
    save_file({name: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=said):
        StableDiffusion(tmp_path / "other.safetensors")


def test_families_missing_parts_and_damage(bases, tmp_path):
    folder, file = bases["sdxl"]
    with pytest.raises(UserError, match=r"family 'stable_diffusion'.*second text encoder"):
        StableDiffusion(file)
    with pytest.raises(UserError, match="family 'sdxl'"):
        SDXL(bases["sd15"][1])
    with pytest.raises(UserError, match="no such checkpoint"):
        SDXL(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="only a single-file checkpoint takes a config"):
        SDXL(folder, config=folder)
    with pytest.raises(UserError, match=r"base\.config"):
        SDXL(file, config=tmp_path / "none" / "at" / "all")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError):
        SDXL(tmp_path / "cut.safetensors", config=folder).fingerprint()
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        SDXL(tmp_path / "text.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="has no vae") as caught:
        SDXL(tmp_path / "bare.safetensors", config=folder).fingerprint()
    assert "base.vae" in str(caught.value)
    assert SDXL(tmp_path / "bare.safetensors", config=folder, vae=folder).encode_images(torch.rand(1, 3, 64, 64))


def test_missing_tensors_are_named(bases, tmp_path):
    folder, file = bases["sdxl"]
    for gone in ("model.diffusion_model.out.2.bias", "conditioner.embedders.1.model.ln_final.bias"):
        save_file({k: v for k, v in load_file(file).items() if k != gone}, tmp_path / "lacking.safetensors")
        family = SDXL(tmp_path / "lacking.safetensors", config=folder)
        with pytest.raises(UserError, match="lacks"):
            _ = family.denoiser if "diffusion" in gone else family.encode_prompts(["p"])


def test_a_folders_scheduler_speaks_for_an_unmarked_file(bases, tmp_path):
    folder, file = bases["sd21_v"]
    assert StableDiffusion(file, config=folder).schedule.prediction_type == "v_prediction"
    settings = shutil.copytree(folder, tmp_path / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    scheduler = settings / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "epsilon"}))
    assert StableDiffusion(file, config=settings).schedule.prediction_type == "epsilon"
