"""Metrics in other places: what they get, what a resumed run does, and what happens when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_dpo import trackers
from lora_dpo.errors import UserError
from lora_dpo.trackers import Trackers
from tests.support.toy import Run
from tests.test_train import Killed, Spiking, die, lines, watch


def opened(directory: Path, names: list[str], said: list[str] | None = None) -> Trackers:
    return Trackers(
        names,
        run_dir=directory,
        project="lora-dpo",
        name="toy",
        config={"name": "toy", "train": {"steps": 6, "ema_decay": None, "targets": ["a", "b"]}},
        tell=(said if said is not None else []).append,
    )


def tensorboard_sees(directory: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    seen = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        assert len({event.step for event in events}) == len(events), "a step is there twice"
        seen[tag] = {event.step: event.value for event in events}
    return seen


def assert_same_as_metrics(directory: Path) -> None:
    written, seen = lines(directory), tensorboard_sees(directory)
    assert set(seen) == set(written[-1]) - {"step"}
    for tag, values in seen.items():
        assert values == pytest.approx({line["step"]: line[tag] for line in written}, rel=1e-6), tag


def train(directory: Path, steps: int = 6, method=None, **options) -> None:
    run = Run(directory)
    with opened(directory, ["tensorboard"]) as open_trackers:
        run.train(steps, method=method(run) if method else run.method, track=open_trackers.log, **options)


def test_tensorboard_has_the_lines_of_the_metrics_file(tmp_path):
    train(tmp_path)
    assert_same_as_metrics(tmp_path)


def test_after_a_kill_tensorboard_has_every_step_once(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, method=lambda run: watch(run, 5, die))  # steps 1 … 5 are there, 4 is saved
    train(tmp_path)
    assert_same_as_metrics(tmp_path)


def test_after_a_rollback_tensorboard_has_what_counts(tmp_path):
    options = {"spike_factor": 2.0, "learning_rate": lambda step: 1e-3, "save_every_steps": 4}
    train(tmp_path, 24, method=lambda run: Spiking(run.method, range(10, 15)), **options)
    assert_same_as_metrics(tmp_path)


class FakeRun:
    def __init__(self) -> None:
        self.lines, self.finished = [], 0

    def log(self, values, step):
        if step == 3:
            raise ConnectionError("no route")
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """In wandb's place, as accelerate uses it."""
    made = []

    def init(**options):
        made.append((options, FakeRun()))
        return made[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return made


def test_wandb_goes_on_in_the_same_run(tmp_path, wandb):
    for step in (1, 2):
        with opened(tmp_path, ["wandb"]) as open_trackers:
            open_trackers.log({"step": step, "loss": 0.5})
    (first, run), (second, again) = wandb
    assert first == second
    assert first["id"] == json.loads((tmp_path / "trackers.json").read_text())["run"]
    assert (first["project"], first["name"], first["resume"]) == ("lora-dpo", "toy", "allow")
    assert first["config"] == {"name": "toy", "train.steps": 6, "train.targets": '["a", "b"]'}
    assert (run.lines, again.lines) == ([(1, {"loss": 0.5})], [(2, {"loss": 0.5})])
    assert run.finished == again.finished == 1


def test_one_that_fails_is_dropped_with_a_line_and_the_others_go_on(tmp_path, wandb):
    said: list[str] = []
    with opened(tmp_path, ["wandb", "tensorboard"], said) as open_trackers:
        for step in range(1, 6):
            open_trackers.log({"step": step, "loss": 0.5})
    assert [step for step, _ in wandb[0][1].lines] == [1, 2]
    assert said == ["the tracker wandb failed (no route) and gets no more; metrics.jsonl has everything"]
    assert list(tensorboard_sees(tmp_path)["loss"]) == [1, 2, 3, 4, 5]


def test_one_that_can_not_start_is_said_before_any_work(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"wandb can't be started \(no API key") as error, opened(tmp_path, ["wandb"]):
        pytest.fail("entered")
    assert error.value.where == "output.trackers"


def test_none_leave_no_trace(tmp_path):
    with opened(tmp_path, []) as open_trackers:
        open_trackers.log({"step": 1, "loss": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(UserError, match=r'no_such_package(?s:.*)pip install "lora-dpo\[mlflow\]"'):
        trackers.require(["tensorboard", "mlflow"])


def test_every_tracker_has_an_extra_and_a_place_in_the_recipe():
    import tomllib
    from typing import get_args

    from lora_dpo.recipe_sections import Output

    (names,) = get_args(Output.model_fields["trackers"].annotation)
    assert set(get_args(names)) == set(trackers.PACKAGES)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(trackers.PACKAGES) <= set(project["optional-dependencies"])
