"""Whatever ends a run, the same command goes on with it: signals in every phase, disks that fail, damaged files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, checkpoint, cli, completion, export, figures, recipe, sampling
from lora_dpo.errors import UserError
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods.pairs import PairMethod
from tests.support.models import save_random_pairs, save_random_sd

ROOT = Path(__file__).parents[1]
RECIPE = """
name = "small"
[data]
path = "{folder}/pairs.parquet"
heldout_fraction = 0.3
resolution = 64
[base]
family = "stable_diffusion"
model = "{folder}/base"
[adapter]
rank = 2
[method]
kind = "dpo"
[train]
steps = 3
batch_pairs = 2
learning_rate = 1e-2
save_every_steps = 2
device = "cpu"
[evaluate]
prompts = 2
steps = 2
guidance = 1
implicit_pairs = 2
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with `small.toml`, its base model and its pairs."""
    folder = tmp_path_factory.mktemp("small")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 12)
    (folder / "small.toml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A run that nothing happened to."""
    return train(world, world / "run").run_dir


def train(world: Path, run_dir: Path, *overrides: str) -> build.Outcome:
    cache_dir = f'output.cache_dir="{run_dir.parent / "cache"}"'
    return build.run(recipe.load(str(world / "small.toml"), [*overrides, cache_dir]), run_dir, quiet=True)


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("adapter/pytorch_lora_weights.safetensors", "kohya/small.safetensors"):
        one, two = load_file(run / name), load_file(other / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    files = [sorted(p.relative_to(d).as_posix() for p in d.rglob("*")) for d in (run, other)]
    assert files[0] == files[1]


def first_time(monkeypatch, owner: object, name: str, act: Callable[[], None]) -> None:
    """`act` just before the first call of `owner.name`."""
    real, called = getattr(owner, name), []

    def watched(*args, **kwargs):
        if not called:
            called.append(True)
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


PHASES: dict[str, tuple[object, str]] = {
    "prompts into the cache": (StableDiffusion, "encode_prompts"),
    "images into the cache": (StableDiffusion, "encode_images"),
    "training": (PairMethod, "loss"),
    "a checkpoint": (checkpoint, "_flatten"),
    "the export": (export, "_in_order"),
    "the held-out pairs": (completion, "held_out"),
    "sampling": (sampling, "_initial_noise"),
    "the figures": (figures, "before_after"),
}


@pytest.mark.parametrize(
    ("phase", "number"), [(phase, (signal.SIGINT, signal.SIGTERM)[n % 2]) for n, phase in enumerate(PHASES)]
)
def test_a_signal_in_any_phase(world, finished, tmp_path, monkeypatch, capsys, phase, number) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    owner, name = PHASES[phase]
    first_time(monkeypatch, owner, name, lambda: os.kill(os.getpid(), number))
    arguments = ["train", str(world / "small.toml"), f'output.cache_dir="{tmp_path / "cache"}"', "--quiet"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--run-dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert caught.value.code == 128 + number
    assert "lora-dpo: interrupted; " in error
    assert error.endswith("→ run the same command again to resume\n")
    assert "Traceback" not in error
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not list(tmp_path.rglob(".*"))  # neither parts of files nor the lock
    train(world, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_a_second_signal_ends_what_the_first_one_is_still_unwinding() -> None:
    script = (
        "import os, signal, sys, time\nfrom lora_dpo.stopping import stoppable\n"
        "with stoppable():\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(60)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n        print('still here')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")


def test_libraries_keep_quiet(world: Path, tmp_path: Path) -> None:
    """Each line is of this run: none of transformers about torchvision, of bitsandbytes about kernels, of diffusers."""
    done = subprocess.run(
        [sys.executable, "-m", "lora_dpo", "train", str(world / "small.toml"), "base.quantization=nf4", "train.steps=1",
         f"output.cache_dir={tmp_path / 'cache'}", "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, env=os.environ | {"CI": ""}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    ours = ("what=", "of", "rows:", "verified:", "held-out")
    lines = done.stderr.splitlines()
    assert len(lines) >= 4
    assert [
        line
        for line in lines
        if not any(word in line.replace(":", ": ").split() or line.startswith(word) for word in ours)
    ] == []


def copy_of(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def changed_base(world: Path, tmp_path: Path, component: str) -> str:
    """Another folder, with one weight of the component changed."""
    base = Path(shutil.copytree(world / "base", tmp_path / "base"))
    [file] = (base / component).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return f'base.model="{base}"'


def changed_data(world: Path, tmp_path: Path) -> str:
    save_random_pairs(tmp_path / "pairs.parquet", 13)
    return f'data.path="{tmp_path / "pairs.parquet"}"'


@pytest.mark.parametrize("what", ["denoiser", "vae", "text_encoders", "data"])
def test_other_files_are_found_out_before_anything_is_loaded_or_written(
    world, finished, tmp_path, monkeypatch, what
) -> None:
    run = copy_of(finished, tmp_path)
    component = {"denoiser": "unet", "vae": "vae", "text_encoders": "text_encoder"}.get(what)
    other = changed_base(world, tmp_path, component) if component else changed_data(world, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("denoiser", "encode_images", "encode_prompts"):
        monkeypatch.setattr(StableDiffusion, name, property(lambda _: pytest.fail("loaded")))
    with pytest.raises(UserError, match=rf'belongs to another run: {what}: "\w+(-\w+)?" → "\w+(-\w+)?"\n'):
        train(world, run, other)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_files_that_have_moved_are_the_same_files(world, tmp_path) -> None:
    overrides = ["evaluate.prompts=0", "evaluate.implicit_pairs=0"]
    whole = train(world, tmp_path / "whole", *overrides).run_dir
    moved = Path(shutil.copytree(world, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run*", "cache")))
    shutil.copytree(whole, tmp_path / "run")
    for name in ("result.json", "checkpoints/step-00000003"):
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    (tmp_path / "run" / "recipe.toml").write_text(
        (tmp_path / "run" / "recipe.toml").read_text().replace(str(world), "/no/such/place")
    )
    (moved / "small.toml").write_text(RECIPE.format(folder=moved))
    outcome = train(moved, tmp_path / "run", *overrides)
    assert not outcome.already
    one, two = (load_file(d / "adapter" / "pytorch_lora_weights.safetensors") for d in (whole, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert str(moved) in (tmp_path / "run" / "recipe.toml").read_text()


def test_a_finished_run_gets_more_steps_and_is_as_if_it_had_been_asked_for_them(world, finished, tmp_path) -> None:
    run = copy_of(finished, tmp_path)
    assert train(world, run, "train.steps=5").result["steps"] == 5
    assert_same_run(run, train(world, tmp_path / "whole", "train.steps=5").run_dir)
    result = (run / "result.json").read_bytes()
    with pytest.raises(UserError, match="it has 5 steps already, 4 are asked for"):
        train(world, run, "train.steps=4")
    assert (run / "result.json").read_bytes() == result


def test_a_run_that_is_there_is_not_gone_on_with_where_that_is_not_wanted(finished, world, tmp_path, capsys) -> None:
    arguments = ["train", str(world / "small.toml"), "--run-dir", str(finished), "--resume", "never", "--quiet"]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "there is a run already, with step 3 saved" in capsys.readouterr().err


def test_an_adapter_that_is_gone_is_written_anew(world, finished, tmp_path) -> None:
    run = copy_of(finished, tmp_path)
    (run / "adapter" / "pytorch_lora_weights.safetensors").unlink()
    assert not train(world, run).already
    assert_same_run(run, finished)
    assert train(world, run).already
