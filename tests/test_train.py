"""The loop: metrics, exact resume after any death, errors that lose nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lora_dpo import atomic, checkpoint, run_dir
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.methods import LossParts, Method
from lora_dpo.train import METRICS, Interrupted
from tests.support.toy import Run

TIMES = {"seconds", "pairs_per_second", "peak_memory_gib"}
STEPS = 6


class Killed(BaseException):
    """Nothing in the package may catch it, as nothing can catch SIGKILL."""


class Watched(Method):
    """Calls `act` before the loss of a part of step `step` (0-based)."""

    def __init__(self, method: Method, step: int, act) -> None:
        self._method, self._step, self._act, self._now = method, step, act, -1

    def batches(self, start_step):
        for batch in self._method.batches(start_step):
            self._now = batch.step
            yield batch

    def loss(self, part) -> LossParts:
        if self._now == self._step:
            replacement = self._act(part)
            if replacement is not None:
                return replacement
        return self._method.loss(part)


def watch(run: Run, step: int, act) -> Method:
    return Watched(run.method, step, act)


def die(_part):
    raise Killed


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def timeless(directory: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(directory)]


def assert_same(value, other) -> None:
    """Equal in types and bits, through dicts and lists."""
    assert type(value) is type(other)
    if isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)
    elif isinstance(value, dict):
        assert list(value) == list(other)
        for key, item in value.items():
            assert_same(item, other[key])
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(other)
        for one, two in zip(value, other, strict=True):
            assert_same(one, two)
    else:
        assert value == other


@pytest.fixture(
    scope="module", params=["adamw", "adamw8bit", "lion8bit", "adafactor", "prodigy", "schedule_free_adamw"]
)
def finished(request, tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("finished"), optimizer=request.param, dropout=0.1)
    run.optimizer_name = request.param  # pyright: ignore
    run.train()
    return run


def test_metrics(tmp_path):
    run = Run(tmp_path)
    result = run.train(learning_rate=lambda step: 0.01 * (step + 1))
    assert (result.steps, result.resumed_from) == (6, 0)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert set(written[0]) == {
        "step", "loss", "implicit_accuracy", "margin", "error_winner", "error_loser", "ref_error_winner",
        "ref_error_loser", "gradient_factor", "grad_norm", "learning_rate", "adapter_norm", "pairs_per_second",
        "seconds", "peak_memory_gib",
    }  # fmt: skip
    assert written[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert written[0]["margin"] == 0.0
    assert [line["learning_rate"] for line in written] == pytest.approx([0.01 * step for step in range(1, 7)])
    assert all(line["seconds"] > 0 and line["peak_memory_gib"] > 0.01 for line in written)
    assert {"step": 6, **result.metrics} == written[-1]
    assert written[-1]["adapter_norm"] == pytest.approx(run.adapters.norm())
    assert run.reporter.advanced == run.reporter.total == 6


def test_training_lowers_the_loss(tmp_path):
    run = Run(tmp_path)
    run.train(40, learning_rate=lambda step: 3e-3, save_every_steps=100)
    written = lines(tmp_path)
    assert sum(line["loss"] for line in written[-10:]) / 10 < 0.5
    assert sum(line["implicit_accuracy"] for line in written[-10:]) / 10 > 0.8


def test_killed_at_any_step_and_resumed_equals_uninterrupted(finished, tmp_path):
    for step in range(STEPS):
        directory = tmp_path / str(step)
        victim = Run(directory, optimizer=finished.optimizer_name, dropout=0.1)
        with pytest.raises(Killed):
            victim.train(method=watch(victim, step, die))
        torch.manual_seed(step)  # a new process has another global state
        resumed = Run(directory, optimizer=finished.optimizer_name, dropout=0.1)
        result = resumed.train()
        assert result.resumed_from == step // 2 * 2
        assert resumed.reporter.advanced == resumed.reporter.total == STEPS
        assert_same(resumed.adapters.state_dict(), finished.adapters.state_dict())
        assert_same(resumed.optimizer.state_dict(), finished.optimizer.state_dict())
        assert timeless(directory) == timeless(finished.directory)


def test_saved_optimizer_state_is_exact(finished):
    found = checkpoint.latest(finished.directory, pytest.fail)
    assert found is not None
    assert found.step == STEPS
    if finished.optimizer_name == "schedule_free_adamw":  # at its end it has the weights to be used, not those it saved
        again = Run(finished.directory, optimizer=finished.optimizer_name, dropout=0.1)
        assert again.train().resumed_from == STEPS
        assert_same(again.adapters.state_dict(), finished.adapters.state_dict())
        assert_same(again.optimizer.state_dict(), finished.optimizer.state_dict())
        assert any(not torch.equal(found.adapter()[name], t) for name, t in finished.adapters.state_dict().items())
        return
    state = finished.optimizer.state_dict()
    assert_same(found.optimizer(), state)
    assert_same(found.adapter(), dict(sorted(finished.adapters.state_dict().items())))
    if finished.optimizer_name == "adamw8bit":
        kinds = {tensor.dtype for tensor in tensors(state)}
        assert torch.uint8 in kinds


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value.values() for t in tensors(item)] if isinstance(value, dict) else []


def test_sigkill(tmp_path):
    """A process killed from outside, wherever it was, and started again."""
    script = (
        "import sys; from pathlib import Path; from tests.support.toy import Run;"
        "Run(Path(sys.argv[1])).train(60, save_every_steps=7)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    metrics = tmp_path / "killed" / METRICS
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 17:
            process.kill()
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    resumed, whole = Run(tmp_path / "killed"), Run(tmp_path / "whole")
    assert 14 <= resumed.train(60, save_every_steps=7).resumed_from < 60
    whole.train(60, save_every_steps=7)
    assert_same(resumed.adapters.state_dict(), whole.adapters.state_dict())
    assert timeless(resumed.directory) == timeless(whole.directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(finished, tmp_path, number, capfd):
    if finished.optimizer_name != "adamw":
        pytest.skip("the signal doesn't depend on the optimizer")
    before = signal.getsignal(number)
    victim = Run(tmp_path, dropout=0.1)
    asked = []

    def ask_once(_part):
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=r"step 4 of 6 is saved .*\n.*run the same command again") as error:
        victim.train(method=watch(victim, 3, ask_once), save_every_steps=100)
    assert error.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err
    resumed = Run(tmp_path, dropout=0.1)
    assert resumed.train().resumed_from == 4
    assert_same(resumed.adapters.state_dict(), finished.adapters.state_dict())
    assert timeless(tmp_path) == timeless(finished.directory)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_death_between_the_renames_of_a_checkpoint_loses_nothing(tmp_path, renamed):
    """Written over one that is there, a checkpoint is absent for a moment, and the old one beside it."""
    Run(tmp_path).train(4)
    checkpoints = tmp_path / "checkpoints"
    newest = checkpoints / "step-00000004"
    shutil.copytree(newest, checkpoints / ".step-00000004.old")
    (checkpoints / ".step-00000005.partial").mkdir()
    if not renamed:
        shutil.rmtree(newest)
    again = Run(tmp_path)
    assert again.train(6).resumed_from == 4
    assert sorted(path.name for path in checkpoints.iterdir())[-1] == "step-00000006"
    assert not list(checkpoints.glob(".*"))


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    run = Run(tmp_path)

    def ask_twice(_part):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("still running")

    with pytest.raises(KeyboardInterrupt):
        run.train(method=watch(run, 3, ask_twice))
    assert Run(tmp_path).train().resumed_from == 2


def test_a_finished_run_does_nothing_more(tmp_path):
    Run(tmp_path).train()
    written = (tmp_path / METRICS).read_bytes()
    again = Run(tmp_path)
    result = again.train()
    assert (result.steps, result.resumed_from, result.metrics) == (6, 6, {})
    assert again.adapters.norm() > 0
    assert (tmp_path / METRICS).read_bytes() == written


def test_a_longer_run_goes_on_and_a_shorter_one_is_refused(tmp_path):
    Run(tmp_path).train(4)
    with pytest.raises(UserError, match="4 steps already, 3 are asked for"):
        Run(tmp_path).train(3)
    assert Run(tmp_path).train(5).resumed_from == 4


def test_another_runs_directory_is_refused_with_every_difference(tmp_path):
    Run(tmp_path).train()
    other = {"data": "other", "method": {"beta": 300.0, "kind": "dpo"}}
    with pytest.raises(UserError) as error:
        Run(tmp_path).train(identity=other)
    for text in ('data: "toy" → "other"', "method.beta: 200.0 → 300.0", 'method.kind: "absent" → "dpo"', "--run-dir"):
        assert text in str(error.value)


def test_other_versions_are_said_on_resume(tmp_path):
    Run(tmp_path).train(2)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0.1"'))
    resumed = Run(tmp_path)
    resumed.train(4)
    [said] = [message for message in resumed.reporter.messages if "other versions (" in message]
    assert f"torch 2.0.1 → {torch.__version__}" in said
    same = Run(tmp_path)
    same.train(5)
    assert not any("other versions (" in message for message in same.reporter.messages)


def test_resume_with_another_micro_batch_is_the_same_to_rounding(tmp_path):
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    one.train(3, micro_batch_pairs=1)
    two.train(2, micro_batch_pairs=4)
    two = Run(tmp_path / "two")
    two.train(3, micro_batch_pairs=3)
    for name, weight in one.adapters.state_dict().items():
        torch.testing.assert_close(two.adapters.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def break_file(name: str, how: str):
    def act(path: Path) -> None:
        file = path / name
        data = bytearray(file.read_bytes())
        match how:
            case "truncated":
                file.write_bytes(data[: len(data) // 2])
            case "flipped":
                data[-20] ^= 1
                file.write_bytes(data)
            case "missing":
                file.unlink()

    return act


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, how):
    if (name, how) == ("state.json", "flipped"):
        pytest.skip("a flipped bit in a number of state.json can't be told from another number")
    whole = Run(tmp_path / "whole")
    whole.train()
    Run(tmp_path / "run").train(keep_checkpoints=3)
    damaged = tmp_path / "run" / "checkpoints" / "step-00000006"
    break_file(name, how)(damaged)
    again = Run(tmp_path / "run")
    result = again.train(keep_checkpoints=1)
    assert result.resumed_from == 4
    assert "step-00000006: damaged checkpoint passed over" in again.reporter.messages[0]
    assert_same(again.adapters.state_dict(), whole.adapters.state_dict())
    assert timeless(again.directory) == timeless(whole.directory)
    found = checkpoint.latest(again.directory, pytest.fail)
    assert found is not None
    assert found.step == 6


def test_nothing_intact_means_starting_over(tmp_path):
    whole = Run(tmp_path)
    whole.train(2)
    break_file("state.json", "truncated")(tmp_path / "checkpoints" / "step-00000002")
    again = Run(tmp_path)
    assert again.train(2).resumed_from == 0
    assert len(again.reporter.messages) == 1
    assert_same(again.adapters.state_dict(), whole.adapters.state_dict())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_later_format_is_refused_not_overwritten(tmp_path):
    Run(tmp_path).train(2)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="newer than this version"):
        Run(tmp_path).train(4)


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (None, [2, 4, 6])])
def test_the_last_checkpoints_are_kept(tmp_path, keep, left):
    Run(tmp_path).train(keep_checkpoints=keep)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in left]
    assert {path.name for path in (tmp_path / "checkpoints" / names[-1]).iterdir()} == {
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


@pytest.mark.parametrize(
    ("number", "message"), [("ENOSPC", "no space left on the disk"), ("EROFS", r"can't be written \(Read-only")]
)
def test_a_disk_that_fails_loses_nothing(tmp_path, monkeypatch, number, message):
    run = Run(tmp_path)
    real, failing = os.fsync, []

    def fail(descriptor: int) -> None:
        if failing and "optimizer" in os.readlink(f"/proc/self/fd/{descriptor}"):
            code = getattr(errno, number)
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=message) as error:
        run.train(method=watch(run, 3, lambda _: failing.append(True)))
    assert "→" in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    failing.clear()
    resumed, whole = Run(tmp_path), Run(tmp_path / "whole")
    assert resumed.train().resumed_from == 2
    whole.train()
    assert_same(resumed.adapters.state_dict(), whole.adapters.state_dict())


def test_a_run_directory_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can't be written"):
        Run(tmp_path / "file" / "run").train()


def test_a_loss_that_is_not_finite_names_step_and_pairs(tmp_path):
    run = Run(tmp_path)
    poisoned = []

    def poison(part):
        if poisoned:
            return None
        poisoned.append(part.keys[1])
        parts = run.method.loss(part)
        per_pair = parts.per_pair.clone()
        per_pair[1] = math.nan
        return LossParts(parts.loss * math.nan, per_pair, parts.sums)

    before = Run(tmp_path / "before")
    before.train(3)
    with pytest.raises(LoraDpoError, match=r"the loss of step 4 isn't finite (?s:.*)learning_rate") as error:
        run.train(method=watch(run, 3, poison))
    assert f"(pairs {poisoned[0]}; " in str(error.value)
    assert not isinstance(error.value, UserError)
    assert_same(run.adapters.state_dict(), before.adapters.state_dict())  # the bad step changed nothing
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert Run(tmp_path).train().resumed_from == 2


def test_a_gradient_that_is_not_finite(tmp_path):
    run = Run(tmp_path)

    def poison(part):
        parts = run.method.loss(part)
        weight = next(iter(run.adapters.parameters().values()))
        infinite = (weight - weight.detach()).abs().sqrt().sum()  # 0 with the slope of √ at 0
        return LossParts(parts.loss + infinite, parts.per_pair, parts.sums)

    with pytest.raises(LoraDpoError, match="the gradient of step 4 isn't finite"):
        run.train(method=watch(run, 3, poison))


def test_the_gradient_is_clipped_and_logged_as_it_was(tmp_path):
    def moved(directory: Path, limit: float) -> tuple[float, float]:
        run = Run(directory)
        start = run.adapters.state_dict()
        optimizer = torch.optim.SGD(run.adapters.parameters().values(), lr=1.0)
        run.train(1, optimizer=optimizer, learning_rate=lambda step: 1.0, max_grad_norm=limit)
        end = run.adapters.state_dict()
        length = sum((end[name] - start[name]).square().sum().item() for name in end) ** 0.5
        return length, lines(directory)[0]["grad_norm"]

    free, norm = moved(tmp_path / "free", 0.0)
    assert free == pytest.approx(norm, rel=1e-3)
    clipped, same = moved(tmp_path / "clipped", norm / 4)
    assert same == norm
    assert clipped == pytest.approx(norm / 4, rel=1e-3)


def test_a_torn_metrics_line_is_cut(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.train(method=watch(run, 3, die))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    Run(tmp_path).train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_bfloat16_passes_train_float32_weights(tmp_path):
    exact, rounded = Run(tmp_path / "exact"), Run(tmp_path / "rounded")
    exact.train(2)
    rounded.train(2, precision="bfloat16")
    assert {p.dtype for p in rounded.adapters.parameters().values()} == {torch.float32}
    one, two = lines(tmp_path / "exact")[1], lines(tmp_path / "rounded")[1]
    assert one["error_winner"] != two["error_winner"]
    assert two["error_winner"] == pytest.approx(one["error_winner"], rel=0.02)


def test_dropout_is_off_again_after_training(tmp_path):
    run = Run(tmp_path, dropout=0.5)
    run.train(1)
    assert not any(layer.lora_dropout.training for layer in run.adapters.layers.values())


OPTIONS = {
    "ema": {"ema_decay": 0.8},
    "held out": {"held_out_every_steps": 3},
    "spike": {"spike_factor": 1.5},
}


class Measured:
    """Held-out numbers that depend on the weights, and would spoil the run if they left a trace in it."""

    def __init__(self, run: Run) -> None:
        self._run, self.seen = run, []

    def __call__(self) -> dict[str, float]:
        torch.rand(3)
        norm = self._run.adapters.norm()
        self.seen.append(norm)
        return {"accuracy": round(norm) / 100, "margin": norm}


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_measuring_leaves_no_trace(tmp_path, optimizer):
    plain, measured = (Run(tmp_path / name, optimizer=optimizer, dropout=0.1) for name in ("plain", "measured"))
    plain.train()
    measured.train(held_out=(probe := Measured(measured)), held_out_every_steps=1)
    assert len(probe.seen) == 6
    assert_same(measured.adapters.state_dict(), plain.adapters.state_dict())
    assert [line["heldout_margin"] for line in lines(tmp_path / "measured")] == probe.seen
    kept = [{k: v for k, v in line.items() if "heldout" not in k} for line in timeless(tmp_path / "measured")]
    assert kept == timeless(tmp_path / "plain")


def test_what_was_measured_is_said_with_the_best(tmp_path):
    run, accuracies = Run(tmp_path), iter([0.5, 0.75, 0.625])
    measure = lambda: {"accuracy": next(accuracies), "margin": 0.25}  # noqa: E731
    run.train(held_out=measure, held_out_every_steps=2)
    assert [message for message in run.reporter.messages if "held-out" in message] == [
        "step 2: held-out accuracy 0.500, margin +0.2500",
        "step 4: held-out accuracy 0.750, margin +0.2500 (the best so far)",
        "step 6: held-out accuracy 0.625, margin +0.2500 (the best: 0.750 at step 4)",
    ]
    assert [measured["accuracy"] for measured in run_dir.held_out_by_step(tmp_path)] == [0.5, 0.75, 0.625]


def test_the_average_is_what_is_measured_and_left(tmp_path):
    run = Run(tmp_path)
    seen = []
    run.train(held_out=lambda: seen.append(run.adapters.state_dict()) or {"accuracy": 0.5, "margin": 0.0},
              held_out_every_steps=1, ema_decay=0.5, keep_checkpoints=None, save_every_steps=1)  # fmt: skip
    mean = {
        name: torch.zeros_like(t) if ".lora_B." in name else t
        for name, t in Run(tmp_path / "x").adapters.state_dict().items()
    }
    for step in range(1, 7):
        weights = checkpoint.at(tmp_path, step).adapter()
        decay = min(0.5, (1 + step) / (10 + step))
        mean = {name: decay * mean[name] + (1 - decay) * weights[name] for name in mean}
        for name, value in mean.items():
            torch.testing.assert_close(seen[step - 1][name], value)
    assert_same(run.adapters.state_dict(), seen[-1])
    assert_same(dict(sorted(seen[-1].items())), checkpoint.at(tmp_path, 6).averaged())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_killed_at_any_step_with_every_option(tmp_path, options):
    def run(directory: Path) -> tuple[Run, dict]:
        made = Run(directory, dropout=0.1)
        return made, options | ({"held_out": Measured(made)} if "held_out_every_steps" in options else {})

    whole, settings = run(tmp_path / "whole")
    whole.train(**settings)
    for step in range(STEPS):
        victim, settings = run(tmp_path / str(step))
        with pytest.raises(Killed):
            victim.train(method=watch(victim, step, die), **settings)
        resumed, settings = run(tmp_path / str(step))
        resumed.train(**settings)
        assert_same(resumed.adapters.state_dict(), whole.adapters.state_dict())
        assert timeless(tmp_path / str(step)) == timeless(tmp_path / "whole")


def test_the_best_checkpoint_is_kept_and_exported(tmp_path):
    run, accuracies = Run(tmp_path), iter([0.5, 0.7, 0.9, 0.9, 0.8, 0.6])
    measure = lambda: {"accuracy": next(accuracies), "margin": 0.0}  # noqa: E731
    result = run.train(
        held_out=measure, held_out_every_steps=1, save_every_steps=100, keep_checkpoints=1, export="best"
    )
    assert (result.steps, result.exported_step) == (6, 3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]
    assert_same(dict(sorted(run.adapters.state_dict().items())), checkpoint.at(tmp_path, 3).adapter())
    break_file("adapter.safetensors", "flipped")(tmp_path / "checkpoints" / "step-00000003")
    with pytest.raises(UserError, match=r'damaged checkpoint .*\n.*evaluate.checkpoint="last"'):
        Run(tmp_path).train(export="best")
    break_file("adapter.safetensors", "flipped")(tmp_path / "checkpoints" / "step-00000003")  # back again
    # A finished run can still be asked for either.
    for export, step in (("last", 6), ("best", 3)):
        again = Run(tmp_path)
        assert again.train(export=export).exported_step == step
        assert_same(dict(sorted(again.adapters.state_dict().items())), checkpoint.at(tmp_path, step).adapter())


class Spiking(Method):
    """Makes the policy's errors large in the batches `bad`, as a collapsing model would."""

    def __init__(self, method: Method, bad: range) -> None:
        self._method, self._bad, self._now = method, bad, -1

    def batches(self, start_step):
        for batch in self._method.batches(start_step):
            self._now = batch.step
            yield batch

    def loss(self, part) -> LossParts:
        found = self._method.loss(part)
        factor = 3.0 if self._now in self._bad else 1.0
        return LossParts(
            found.loss, found.per_pair, found.sums | {"error_winner": found.sums["ref_error_winner"] * factor}
        )


def test_a_spike_is_gone_back_from_and_its_pairs_passed_over(tmp_path):
    options = {"spike_factor": 2.0, "learning_rate": lambda step: 1e-3, "save_every_steps": 4}
    run = Run(tmp_path / "run")
    result = run.train(24, method=Spiking(run.method, range(10, 15)), **options)
    assert result.rollbacks == 1
    [said] = [m for m in run.reporter.messages if "times the reference" in m]
    assert said.startswith(
        "step 13: the policy's error on the preferred images is 2.2 times the reference's; back to step 8"
    )
    written = lines(tmp_path / "run")
    assert [line["step"] for line in written] == list(range(1, 25))
    assert [line["learning_rate"] for line in written] == [1e-3] * 8 + [5e-4] * 16
    assert run.reporter.advanced == run.reporter.total == 24
    # Step 9 has the pairs of batch 13, the first one behind the spike. That one is still bad, alone.
    assert checkpoint.at(tmp_path / "run", 24).rollbacks == [(13, 8)]
    # Killed anywhere, it ends the same.
    for step in (9, 12, 14, 20):
        directory = tmp_path / str(step)
        victim = Run(directory)
        with pytest.raises(Killed):
            victim.train(24, method=Watched(Spiking(victim.method, range(10, 15)), step, die), **options)
        resumed = Run(directory)
        resumed.train(24, method=Spiking(resumed.method, range(10, 15)), **options)
        assert_same(resumed.adapters.state_dict(), run.adapters.state_dict())
        assert timeless(directory) == timeless(tmp_path / "run")


def test_spikes_without_end_stop_the_run(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(LoraDpoError, match=r"training diverges.*\n.*learning_rate"):
        run.train(60, method=Spiking(run.method, range(20, 200)), spike_factor=2.0, save_every_steps=4)
    assert sum("back to step" in message for message in run.reporter.messages) == 2
    assert checkpoint.latest(tmp_path, pytest.fail) is not None


def test_a_spike_before_any_checkpoint(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(LoraDpoError, match="no checkpoint before it"):
        run.train(20, method=Spiking(run.method, range(0, 20)), spike_factor=2.0, save_every_steps=100)


def test_what_was_not_finite_is_written_down(tmp_path):
    run = Run(tmp_path)

    def poison(part):
        found = run.method.loss(part)
        return LossParts(found.loss * math.nan, found.per_pair * math.nan, found.sums)

    with pytest.raises(LoraDpoError, match=r"not_finite\.json"):
        run.train(method=watch(run, 4, poison))
    held = json.loads((tmp_path / "not_finite.json").read_text())
    assert (held["what"], held["step"], len(held["pairs"])) == ("loss", 5, 4)
    batch = next(iter(run.method.batches(4)))
    assert [pair["key"] for pair in held["pairs"]] == batch.keys
    assert [pair["timestep"] for pair in held["pairs"]] == [int(t) for part in batch.parts() for t in part.t]
    assert held["pairs"][0]["origin"].startswith("toy:")
    assert checkpoint.latest(tmp_path, pytest.fail).step == 4  # pyright: ignore


def test_what_was_not_finite_is_said_even_if_it_can_not_be_written_down(tmp_path, monkeypatch):
    run = Run(tmp_path)

    def poison(part):
        monkeypatch.setattr(atomic, "replace", full)
        found = run.method.loss(part)
        return LossParts(found.loss * math.nan, found.per_pair * math.nan, found.sums)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LoraDpoError, match=r"loss of step 5 isn't finite .* could not be written .*No space") as error:
        run.train(method=watch(run, 4, poison))
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(("every", "keep"), [(1, 1), (2, 1), (3, 2), (7, 1)])
def test_there_is_a_checkpoint_to_go_back_to_however_few_are_kept(tmp_path, every, keep):
    """A spike is seen some steps after it has begun, and checkpoints from in between are no way back."""
    options = {"spike_factor": 2.0, "learning_rate": lambda step: 1e-3}
    run = Run(tmp_path)
    result = run.train(
        24, method=Spiking(run.method, range(10, 15)), save_every_steps=every, keep_checkpoints=keep, **options
    )
    assert result.rollbacks == 1
    [(bad, good)] = checkpoint.at(tmp_path, 24).rollbacks
    assert bad == 13
    assert good == max(step for step in range(0, 9) if step % every == 0)
    assert len(checkpoint.steps(tmp_path)) <= 1 + max(keep, -(-5 // every) + 1)  # the last step, be it regular or not


@pytest.mark.parametrize("step", [3, 9, 13, 20])
def test_where_a_run_was_interrupted_does_not_decide_where_a_spike_goes_back_to(tmp_path, step):
    options = {"spike_factor": 2.0, "learning_rate": lambda step: 1e-3, "save_every_steps": 4, "keep_checkpoints": 2}
    whole, victim, resumed = Run(tmp_path / "whole"), Run(tmp_path / "cut"), Run(tmp_path / "cut")
    whole.train(24, method=Spiking(whole.method, range(10, 15)), **options)
    asked = []

    def interrupt(_part):
        if not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        victim.train(24, method=Watched(Spiking(victim.method, range(10, 15)), step, interrupt), **options)
    result = resumed.train(24, method=Spiking(resumed.method, range(10, 15)), **options)
    assert result.rollbacks == 1
    assert_same(resumed.adapters.state_dict(), whole.adapters.state_dict())
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_a_schedule_free_checkpoint_has_the_average_too(tmp_path):
    run = Run(tmp_path, optimizer="schedule_free_adamw")
    run.train()
    saved = checkpoint.at(tmp_path, 6)
    averaged = saved.averaged()
    assert averaged is not None
    assert_same(averaged, dict(sorted(run.adapters.state_dict().items())))
    assert any(not torch.equal(averaged[name], weight) for name, weight in saved.adapter().items())


def test_after_a_rollback_the_best_step_is_one_that_is_there(tmp_path):
    """Step 12 was the best and pushed out step 2, the best before; then the spike takes step 12 away."""
    run, accuracies = Run(tmp_path), iter([0.8, 0.5, 0.5, 0.5, 0.5, 0.9, *[0.5] * 20])
    result = run.train(
        24,
        method=Spiking(run.method, range(10, 15)),
        spike_factor=2.0,
        learning_rate=lambda step: 1e-3,
        save_every_steps=4,
        held_out=lambda: {"accuracy": next(accuracies), "margin": 0.0},
        held_out_every_steps=2,
        export="best",
    )
    assert (result.rollbacks, result.exported_step) == (1, 8)
    assert checkpoint.steps(tmp_path) == [24, 20, 8]
