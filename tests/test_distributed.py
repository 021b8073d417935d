"""Two processes on the CPU: the same mathematics as one, and together in failure."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_dpo import checkpoint, distributed
from lora_dpo.distributed import Processes, connect
from lora_dpo.errors import UserError
from tests.support import processes as support
from tests.support.toy import Run
from tests.test_train import lines, timeless

SCENARIOS = [
    "gradients", "dropout", "whole", "begun", "resumed", "poisoned", "stopped", "others", "too many", "blocked",
    "watched",
]  # fmt: skip
ALONE = Processes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes have been through all scenarios, "resumed" begun by one process."""
    folder = tmp_path_factory.mktemp("two")
    Run(folder / "resumed").train(4)
    (folder / "blocked").mkdir()
    (folder / "blocked" / "checkpoints").write_text("a file in the way")
    for code, error in support.finish(support.start(2, str(folder), *SCENARIOS)):
        assert code == 0, error
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, list[Any]]:
    """What the two of them had of each scenario."""
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in SCENARIOS}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return support.trained(ALONE, tmp_path_factory.mktemp("one"))


def assert_close(value: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """As after another summation order, through Adam's division by small numbers."""
    assert value.keys() == other.keys()
    for name, tensor in value.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["4 None", "4 1", "4 2", "3 None", "3 1", "5 2"])
def test_the_gradient_and_the_sums_are_those_of_one_process(told, case: str) -> None:
    batch, micro = case.split()
    expected = support.gradient(ALONE, int(batch), None if micro == "None" else int(micro))
    first, second = (one[case] for one in told["gradients"])
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        assert tensor.abs().max() > 0 or "lora" not in name
        assert (first[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name


def test_dropout_is_that_of_one_process_if_shares_are_whole_micro_batches(told) -> None:
    expected, without = support.gradient(ALONE, 4, 2, dropout=0.3), support.gradient(ALONE, 4, 2)
    for name, tensor in told["dropout"][0].items():
        assert (tensor - expected[name]).abs().max() <= 2e-6 * expected[name].abs().max(), name
    assert not torch.allclose(expected["loss"], without["loss"], rtol=1e-3)


def test_both_have_the_same_bits_after_every_step_and_one_process_has_them_to_rounding(told, folder, alone) -> None:
    first, second = told["whole"]
    assert len(first["digests"]) == len(set(first["digests"])) == 6
    assert first["digests"] == second["digests"]
    assert_close(first["adapter"], alone["adapter"])
    found = checkpoint.latest(folder / "whole", pytest.fail)
    assert found is not None
    assert found.step == 6
    assert all(torch.equal(tensor, first["adapter"][name]) for name, tensor in found.adapter().items())


def test_metrics_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    Run(tmp_path).train()
    two, one = timeless(folder / "whole"), timeless(tmp_path)
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(two, one, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_begun_by_two_and_ended_by_one(told, folder, alone) -> None:
    assert len(told["begun"][0]["digests"]) == 4
    ended = support.trained(ALONE, folder / "begun")
    assert ended["resumed_from"] == 4
    assert_close(ended["adapter"], alone["adapter"])
    assert [line["step"] for line in lines(folder / "begun")] == [1, 2, 3, 4, 5, 6]


def test_begun_by_one_and_ended_by_two(told, folder, alone) -> None:
    first, second = told["resumed"]
    assert first["resumed_from"] == second["resumed_from"] == 4
    assert first["digests"] == second["digests"]
    assert_close(first["adapter"], alone["adapter"])
    assert [line["step"] for line in lines(folder / "resumed")] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_both_and_names_the_pair(told, folder) -> None:
    main, failed = (one["failure"] for one in told["poisoned"])
    pair = (folder / "poisoned.txt").read_text()
    assert failed[0] == "LoraDpoError"
    assert f"the loss of step 4 isn't finite (pairs {pair};" in failed[2]
    assert main[0] == "StoppedElsewhere"
    assert main[1] == 1
    assert main[2] == f"process 0 stops, because process 1 did: {failed[2]}"
    assert told["poisoned"][0]["digests"] == told["whole"][0]["digests"][:3]
    assert [line["step"] for line in lines(folder / "poisoned")] == [1, 2, 3]


def test_a_signal_to_one_lets_both_finish_the_step_and_the_main_one_save(told, folder) -> None:
    for one in told["stopped"]:
        assert one["failure"][:2] == ("Interrupted", 130)
        assert "step 4 of 6 is saved" in one["failure"][2]
    found = checkpoint.latest(folder / "stopped", pytest.fail)
    assert found is not None
    assert found.step == 4


def test_both_go_back_from_a_spike_and_end_with_the_same_average(told, folder, tmp_path) -> None:
    first, second = told["watched"]
    alone = support.watched(ALONE, tmp_path)
    assert first["failure"] is second["failure"] is alone["failure"] is None
    assert any("back to step 8" in message for message in first["messages"]), first["messages"]
    assert first["messages"][0] == alone["messages"][0]
    assert len(first["digests"]) == len(alone["digests"]) > 24
    assert first["digests"] == second["digests"]
    assert all(torch.equal(tensor, second["adapter"][name]) for name, tensor in first["adapter"].items())
    assert_close(first["adapter"], alone["adapter"])
    assert [line["step"] for line in lines(folder / "watched")] == list(range(1, 25))
    assert [n for n, line in enumerate(lines(folder / "watched"), 1) if "heldout_margin" in line] == list(
        range(3, 25, 3)
    )


def test_processes_with_other_data_are_refused(told, folder) -> None:
    for one in told["others"]:
        assert one["failure"][:2] == ("UserError", 2)
        assert "process 1 differs from process 0 in data\n" in one["failure"][2]
    assert not (folder / "others").exists()


def test_a_checkpoint_that_can_not_be_written_stops_both(told) -> None:
    main, other = (one["failure"] for one in told["blocked"])
    assert main[0] == "UserError"
    assert "can't be written" in main[2]
    assert other[:2] == ("StoppedElsewhere", 2)


def test_more_processes_than_pairs_are_refused(told) -> None:
    for text in told["too many"]:
        assert "train.batch_pairs: 1 can't be shared by 2 processes" in text


def test_shares_are_whole_and_even() -> None:
    for count in (1, 2, 3, 7):
        everyone = [Processes.share(_place(rank, count), 10) for rank in range(count)]
        assert [n for share in everyone for n in range(10)[share]] == list(range(10))
        sizes = [len(range(10)[share]) for share in everyone]
        assert max(sizes) - min(sizes) <= 1


def _place(rank: int, count: int) -> Processes:
    place = Processes()
    place.rank, place.count = rank, count
    return place


def long_run(folder: Path, until: int, number: int, **more: str) -> None:
    """Two processes of 400 steps; after so many steps the second one gets the signal, and the first one ends."""
    folder.mkdir()
    started = support.start(2, str(folder), "long", **more)
    deadline = time.monotonic() + 300
    metrics = folder / "metrics.jsonl"
    try:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < until:
            assert time.monotonic() < deadline
            assert [process.poll() for process in started] == [None, None]
            time.sleep(0.01)
        started[1].send_signal(number)
        started[0].wait(120)  # it notes why
    finally:
        started[1].kill()
        support.finish(started)


def test_a_killed_process_ends_the_run_which_goes_on_with_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long_run(folder, 17, signal.SIGKILL)
    kind, _, text = torch.load(folder / "long-0.pt")["failure"]
    assert kind == "LoraDpoError"
    assert "process 0 stops: the connection to the other processes is lost" in text
    done = len(lines(folder))
    steps = done + 10
    resumed, whole = support.trained(ALONE, folder, steps), support.trained(ALONE, tmp_path / "whole", steps)
    assert 14 <= resumed["resumed_from"] <= done
    assert_close(resumed["adapter"], whole["adapter"])
    assert [line["step"] for line in lines(folder)] == list(range(1, steps + 1))


def test_a_process_that_hangs_ends_the_run_in_time(tmp_path: Path) -> None:
    long_run(tmp_path / "run", 3, signal.SIGSTOP, **{distributed.TIMEOUT: "4"})
    text = torch.load(tmp_path / "run" / "long-0.pt")["failure"][2]
    assert "the other processes didn't answer for 4 s" in text


def test_one_process_initialises_nothing(monkeypatch) -> None:
    device = torch.device("cpu")
    for count in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if count is not None:
            monkeypatch.setenv("WORLD_SIZE", count)
        joined, own = connect(device)
        assert (joined.count, joined.rank, joined.is_main, own) == (1, 0, True, device)
    assert not torch.distributed.is_initialized()


def test_an_environment_that_is_not_complete(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        connect(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"\$WORLD_SIZE: got 'two'"):
        connect(torch.device("cpu"))


@pytest.mark.parametrize(("device", "gpus"), [("cuda:1", 4), ("cuda", 1)])
def test_one_gpu_for_two_processes_is_refused(monkeypatch, device: str, gpus: int) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=r"train\.device: .*GPU.*, and 2 processes on this machine"):
        connect(torch.device(device))


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_timeout_that_is_none(monkeypatch, value: str) -> None:
    monkeypatch.setenv(distributed.TIMEOUT, value)
    with pytest.raises(UserError, match="expected a number of seconds"):
        distributed.timeout_seconds()


def test_no_process_is_left(folder: Path) -> None:
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children")
    if children.exists():
        names = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()]
        assert not any(b"tests.support.processes" in name for name in names)
