"""Images depend on (seed, prompt) alone, equal diffusers' own path, and leave the pipeline as it was."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import (
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from PIL import Image

from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.randomness import torch_generator
from lora_dpo.sampling import base_and_adapted, sample, save_pngs, to_pil
from tests.support.models import save_random_sd, save_random_sdxl

# diffusers' Euler schedulers hand a tensor expression to np.array, which numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red cat", "a blue dog on a hat", "a red cat"]
SEEDS = [3, 5, 9]
OPTIONS = {"steps": 3, "guidance": 4.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return {"sdxl": save_random_sdxl(path / "sdxl"), "sd": save_random_sd(path / "sd")}


@pytest.fixture
def sdxl(folders):
    return StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])


@pytest.fixture(params=["sdxl", "sd"])
def pipeline(request, folders):
    kind = StableDiffusionXLPipeline if request.param == "sdxl" else StableDiffusionPipeline
    return kind.from_pretrained(folders[request.param])


class Jobs:
    """A progress that writes down what it is told."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        self.seen.append(("start", total))

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.seen.append(n)

    def message(self, text: str) -> None:
        self.seen.append(text)

    def stop(self) -> None:
        self.seen.append("stop")


def add_lora(pipeline, scale: float = 0.3) -> None:
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def test_shape_and_range(pipeline):
    images = sample(pipeline, PROMPTS, SEEDS, **OPTIONS)
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negatives", [None, ["", "dog", "cat"]])
def test_equals_the_stock_path(pipeline, guidance, negatives):
    ours = sample(pipeline, PROMPTS, SEEDS, **{**OPTIONS, "guidance": guidance}, negative_prompts=negatives)
    size = 64 // pipeline.vae_scale_factor
    latents = [
        torch.randn(4, size, size, generator=torch_generator(seed, "sample", prompt))
        for seed, prompt in zip(SEEDS, PROMPTS, strict=True)
    ]
    stock = pipeline(
        prompt=PROMPTS,
        negative_prompt=negatives,
        latents=torch.stack(latents),
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=64,
        output_type="pt",
    ).images
    assert torch.allclose(ours, stock, atol=1e-5)


def test_guidance_and_prompt_matter(pipeline):
    plain = sample(pipeline, ["a red cat"], [1], **{**OPTIONS, "guidance": 1.0})
    guided = sample(pipeline, ["a red cat"], [1], **OPTIONS)
    negative = sample(pipeline, ["a red cat"], [1], **OPTIONS, negative_prompts=["a red cat"])
    assert not torch.allclose(plain, guided, atol=1e-4)
    # Guidance away from the prompt itself cancels.
    assert torch.allclose(plain, negative, atol=1e-4)


@pytest.mark.parametrize("stochastic", [False, True])
def test_independent_of_batch_order_and_neighbours(pipeline, stochastic):
    if stochastic:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    together = sample(pipeline, PROMPTS, SEEDS, **OPTIONS)
    for batch in (1, 2):
        assert torch.allclose(sample(pipeline, PROMPTS, SEEDS, **OPTIONS, batch=batch), together, atol=1e-5)
    backwards = sample(pipeline, PROMPTS[::-1], SEEDS[::-1], **OPTIONS)
    assert torch.allclose(backwards.flip(0), together, atol=1e-5)
    torch.manual_seed(123)
    assert torch.equal(sample(pipeline, PROMPTS, SEEDS, **OPTIONS), together)
    assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_repeated_prompts_are_encoded_once(sdxl, monkeypatch):
    seen = []
    encode = sdxl.encode_prompt

    def counted(*args, **keywords):
        if keywords.get("prompt") is not None:
            seen.extend(keywords["prompt"])
        return encode(*args, **keywords)

    monkeypatch.setattr(sdxl, "encode_prompt", counted)
    sample(sdxl, PROMPTS, SEEDS, **OPTIONS, batch=1)
    assert seen == ["a red cat", "a blue dog on a hat"]


def test_leaves_the_pipeline_as_it_was(folders):
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"])
    pipeline.set_progress_bar_config(desc="mine")
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    before = [module.training for module in pipeline.unet.modules()]
    checker = torch.nn.Identity()
    pipeline.safety_checker = checker
    sample(pipeline, ["a"], [0], **OPTIONS)
    assert [module.training for module in pipeline.unet.modules()] == before
    assert pipeline.safety_checker is checker
    assert pipeline._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("fails", [False, True])
def test_text_encoders_are_aside_while_pictures_are_drawn(pipeline, monkeypatch, fails):
    names = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
    before = {name: getattr(pipeline, name) for name in names}
    config = dict(pipeline.config)
    there = []
    forward = pipeline.unet.forward

    def watched(*args, **kwargs):
        there.append([getattr(pipeline, name) for name in names])
        if fails:
            raise KeyError("no picture")
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.unet, "forward", watched)
    with pytest.raises(KeyError) if fails else nullcontext():
        sample(pipeline, PROMPTS, SEEDS, **OPTIONS)
    assert there
    assert all(encoder is None for step in there for encoder in step)
    assert all(getattr(pipeline, name) is encoder for name, encoder in before.items())
    assert dict(pipeline.config) == config


def test_progress_counts_images(sdxl):
    jobs = Jobs()
    sample(sdxl, PROMPTS, SEEDS, **OPTIONS, batch=2, progress=jobs)
    assert jobs.seen == [("start", 3), 2, 1, "stop"]


def test_no_prompts_no_images(sdxl):
    assert sample(sdxl, [], [], **OPTIONS).shape == (0, 3, 64, 64)


def test_base_and_adapted(pipeline):
    plain = sample(pipeline, PROMPTS, SEEDS, **OPTIONS)
    add_lora(pipeline)
    changed = sample(pipeline, PROMPTS, SEEDS, **OPTIONS)
    jobs = Jobs()
    base, adapted = base_and_adapted(pipeline, PROMPTS, SEEDS, **OPTIONS, progress=jobs)
    assert torch.equal(base, plain)
    assert torch.equal(adapted, changed)
    assert not torch.allclose(base, adapted, atol=1e-3)
    assert jobs.seen == [("start", 6), 3, 3, "stop"]
    assert torch.equal(sample(pipeline, PROMPTS, SEEDS, **OPTIONS), changed)
    pipeline.disable_lora()
    assert torch.equal(sample(pipeline, PROMPTS, SEEDS, **OPTIONS), base)


def test_a_lora_that_was_off_is_used_and_off_again(sdxl):
    add_lora(sdxl)
    changed = sample(sdxl, ["a"], [0], **OPTIONS)
    sdxl.disable_lora()
    plain = sample(sdxl, ["a"], [0], **OPTIONS)
    base, adapted = base_and_adapted(sdxl, ["a"], [0], **OPTIONS)
    assert torch.equal(base, plain)
    assert torch.equal(adapted, changed)
    assert torch.equal(sample(sdxl, ["a"], [0], **OPTIONS), plain)


def test_the_lora_is_back_after_an_exception(sdxl):
    add_lora(sdxl)
    changed = sample(sdxl, ["a"], [0], **OPTIONS)

    class Interrupting(Jobs):
        def advance(self, n: int = 1, **metrics: float) -> None:
            raise KeyboardInterrupt

    jobs = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        base_and_adapted(sdxl, ["a"], [0], **OPTIONS, progress=jobs)
    assert jobs.seen == [("start", 2), "stop"]
    assert torch.equal(sample(sdxl, ["a"], [0], **OPTIONS), changed)


def test_a_reference_scope_replaces_the_toggle(sdxl):
    from contextlib import contextmanager

    plain = sample(sdxl, ["a"], [0], **OPTIONS)
    add_lora(sdxl)
    entered = []

    @contextmanager
    def reference():
        entered.append(True)
        sdxl.disable_lora()
        yield
        sdxl.enable_lora()

    base, adapted = base_and_adapted(sdxl, ["a"], [0], **OPTIONS, reference=reference)
    assert entered == [True]
    assert torch.equal(base, plain)
    assert not torch.equal(adapted, plain)


def test_without_a_lora_there_is_nothing_to_compare(sdxl):
    with pytest.raises(UserError, match="no LoRA is loaded"):
        base_and_adapted(sdxl, ["a"], [0], **OPTIONS)


def test_nan_names_prompt_and_seed(sdxl):
    sdxl.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(LoraDpoError, match="'a red cat' with seed 3"):
        sample(sdxl, PROMPTS, SEEDS, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 60}, "height has to be a positive multiple of 8"),
        ({"steps": 0}, "at least 1 step"),
        ({"batch": 0}, "at least 1 image"),
        ({"guidance": 0.5}, "guidance has to be 1 or more"),
        ({"guidance": float("nan")}, "guidance has to be 1 or more"),
    ],
)
def test_bad_options_are_the_users_errors(sdxl, change, message):
    with pytest.raises(UserError, match=message):
        sample(sdxl, PROMPTS, SEEDS, **{**OPTIONS, **change})


def test_a_scheduler_without_per_image_noise_is_refused(sdxl):
    sdxl.scheduler.__class__ = type(DPMSolverSDEScheduler.__name__, (type(sdxl.scheduler),), {})
    with pytest.raises(UserError, match="can't be seeded per image"):
        sample(sdxl, PROMPTS, SEEDS, **OPTIONS)


def test_lengths_have_to_agree(sdxl):
    with pytest.raises(LoraDpoError, match="3 prompts need as many seeds"):
        sample(sdxl, PROMPTS, [1], **OPTIONS)


def test_pngs_carry_their_provenance(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    facts = [{"prompt": f"ein Kätzchen 猫 {i}", "seed": i, "steps": 3, "guidance": 4.0} for i in range(2)]
    paths = save_pngs(images, tmp_path / "samples", ["one", "two.png"], facts)
    assert [path.name for path in paths] == ["one.png", "two.png"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["one.png", "two.png"]
    with Image.open(paths[1]) as image:
        assert image.text == {"prompt": "ein Kätzchen 猫 1", "seed": "1", "steps": "3", "guidance": "4.0"}
        assert image.tobytes() == to_pil(images[1]).tobytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    [path] = save_pngs(torch.zeros(1, 3, 8, 8), tmp_path, ["a"])
    before = path.read_bytes()

    def full(*args, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        save_pngs(torch.ones(1, 3, 8, 8), tmp_path, ["a"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["../a", "b/a", ""])
def test_names_stay_in_the_directory(tmp_path, name):
    with pytest.raises(LoraDpoError, match="not a file name"):
        save_pngs(torch.zeros(1, 3, 8, 8), tmp_path, [name])
