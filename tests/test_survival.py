"""Whatever ends a run, the same command goes on with it: signals in every phase, disks that fail, damaged files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, checkpoint, cli, completion, export, figures, recipe, sampling
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
