"""The commands of docs/distributed.md, through the real launchers and command line, on a small model and the CPU."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, checkpoint, recipe
from tests.support.models import save_random_pairs, save_random_sd
from tests.support.processes import environment, free_port

TEXT = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    "lora-dpo": [sys.executable, "-m", "lora_dpo"],
}
RECIPE = """
[data]
path = "pairs.parquet"
heldout_fraction = 0.3
resolution = 64
[base]
family = "stable_diffusion"
model = "base"
[adapter]
rank = 4
[method]
kind = "dpo"
beta = 500
[train]
steps = 4
batch_pairs = 3
learning_rate = 1e-2
save_every_steps = 2
[evaluate]
prompts = 2
steps = 2
implicit_pairs = 4
[output]
cache_dir = "{cache}"
trackers = []
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 24)
    (folder / "small.toml").write_text(RECIPE.format(cache=folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    build.run(
        recipe.load(str(world / "small.toml"), [f"output.cache_dir={world / 'other-cache'}"]),
        world / "alone",
        quiet=True,
    )
    return world / "alone"


def command(text: str, run_dir: Path, *overrides: str, replaced: dict[str, str] | None = None) -> list[str]:
    """A documented command with the small recipe in place of SDXL's."""
    small = {"sdxl_lora data.path=/data/pickapic_v2": "small.toml", "runs/sdxl": str(run_dir)}
    for old, new in (small | (replaced or {})).items():
        assert old in text
        text = text.replace(old, new)
    name, *words = shlex.split(text)
    return [*LAUNCHERS[name], *words, *overrides]


def start(world: Path, words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=world, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*started: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        said = [process.communicate(timeout=300) for process in started]
        return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.communicate()


def assert_same_run(run_dir: Path, alone: Path) -> None:
    """One process wrote it, once, and what was learned is what one process learns alone, up to rounding."""
    one, two = (load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (alone, run_dir))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    results = [json.loads((folder / "result.json").read_text()) for folder in (alone, run_dir)]
    assert results[0]["implicit"]["accuracy"] == results[1]["implicit"]["accuracy"]
    assert results[1]["verification"]["difference"] < 1e-5


def test_torchrun_from_an_empty_cache_to_the_report(world: Path, alone: Path) -> None:
    [(code, out, err)] = finish(start(world, command(COMMANDS[0], world / "two")))
    assert code == 0, err
    assert out.count("small is finished: 4 steps") == 1
    assert err.count("rows:") == 1
    assert_same_run(world / "two", alone)
    names = {path.name for path in (world / "two").iterdir()}
    assert names == {path.name for path in alone.iterdir()}
    [(code, out, _)] = finish(start(world, command(COMMANDS[0], world / "two")))
    assert code == 0
    assert out.count("finished already") == 1


class Killed(BaseException):
    pass


def test_accelerate_launch_goes_on_where_one_process_was(world: Path, alone: Path, monkeypatch) -> None:
    step, made = torch.optim.AdamW.step, []

    def dying(self, *args, **kwargs):
        made.append(1)
        if len(made) == 4:
            raise Killed
        return step(self, *args, **kwargs)

    settings = recipe.load(str(world / "small.toml"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Killed):
            build.run(settings, world / "accelerated", quiet=True)
    [(code, out, err)] = finish(start(world, command(COMMANDS[1], world / "accelerated")))
    assert code == 0, err
    assert "resumed at step 2 of 4" in err
    assert out.count("small is finished") == 1
    assert_same_run(world / "accelerated", alone)


def test_two_machines(world: Path, alone: Path) -> None:
    here = {"first.example:29500": f"127.0.0.1:{free_port()}", "--nproc-per-node 2": "--nproc-per-node 1"}
    passes = ["train.gradient_checkpointing=full", "train.micro_batch_pairs=1"]
    words = command(COMMANDS[2], world / "machines", *passes, replaced=here)
    ended = finish(start(world, words), start(world, words))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sum(out.count("small is finished") for _, out, _ in ended) == 1
    assert_same_run(world / "machines", alone)


def test_ctrl_c_saves_and_one_process_goes_on(world: Path) -> None:
    run_dir = world / "stopped"
    many = ["train.steps=3000", "train.save_every_steps=3000"]
    process = start(world, command(COMMANDS[0], run_dir, *many))
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    [(code, _, err)] = finish(process)
    assert code != 0
    found = checkpoint.latest(run_dir, pytest.fail)
    assert found is not None
    assert found.step == metrics.read_bytes().count(b"\n") >= 5
    assert f"interrupted; step {found.step} of 3000 is saved" in err
    again = start(world, command(COMMANDS[3], run_dir, *many))
    while metrics.read_bytes().count(b"\n") < found.step + 3:
        assert again.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again.send_signal(signal.SIGTERM)
    [(code, _, err)] = finish(again)
    assert code == 143
    assert f"resumed at step {found.step} of 3000" in err


def test_a_mistake_is_told_by_all_and_leaves_nothing(world: Path) -> None:
    [(code, _, err)] = finish(start(world, command(COMMANDS[0], world / "wrong", "train.batch_pairs=1")))
    assert code != 0
    assert "train.batch_pairs: 1 can't be shared by 2 processes" in err
    assert not list((world / "wrong").glob("checkpoints/*"))


def test_the_document_has_these_commands() -> None:
    assert [shlex.split(line)[0] for line in COMMANDS] == ["torchrun", "accelerate", "torchrun", "lora-dpo"]
    for message in ("can't be shared by", "one process per GPU", "differs from process 0 in"):
        assert message in TEXT
        assert message in (Path(build.__file__).parent / "distributed.py").read_text("utf-8")
