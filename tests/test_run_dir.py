"""Whose a run directory is: one recipe's, and one process's at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_dpo import run_dir as run_dirs
from lora_dpo.errors import UserError
from lora_dpo.run_lock import LOCK, locked

ROOT = Path(__file__).parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from lora_dpo.run_lock import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
)


@contextlib.contextmanager
def holder(directory: Path) -> Iterator[int]:
    """The pid of another process that holds the lock; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


def same(_file: Path) -> run_dirs.Differences:
    return run_dirs.Differences([], [])


def test_the_second_process_is_told_who_is_there_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    with (
        holder(tmp_path / "run") as pid,
        pytest.raises(UserError, match=rf"another process .*: pid {pid} on .+, since 2") as error,
        locked(tmp_path / "run"),
    ):
        pytest.fail("two at once")
    assert error.value.where == str(tmp_path / "run")
    assert "--run-dir" in str(error.value.hint)
    assert (tmp_path / "run" / LOCK).exists()  # left behind, without effect
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_bytes())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_within_one_process_too(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()}"), locked(tmp_path):
        pytest.fail("two at once")


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """Its holder removes it between our opening and our locking: ours would be a lock that nobody else sees."""
    real, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
        monkeypatch.undo()
        with pytest.raises(UserError, match="another process"), locked(tmp_path):
            pytest.fail("two at once")


def test_many_threads_one_at_a_time(tmp_path: Path) -> None:
    inside, most, entered = [], [], []

    def work() -> None:
        while len(entered) < 40:
            try:
                with locked(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(1)
                    inside.pop()
            except UserError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) >= 40
    assert max(most) == 1


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_claiming_removes_what_a_killed_process_was_writing(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "adapter").mkdir()
    for name in (".result.json.partial", "adapter/.x.safetensors.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".notes.old").touch()
    run_dirs.claim(tmp_path, "name = 'x'\n")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".notes.old", "recipe.toml"]


def test_a_finished_run_is_read_without_the_lock_and_without_writing(tmp_path: Path) -> None:
    run_dirs.claim(tmp_path, "name = 'x'\n")
    run_dirs.finish(tmp_path, {"steps": 3})
    with holder(tmp_path):
        before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
        assert run_dirs.finished(tmp_path, same) == {"steps": 3}
        assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_set_aside_renames_and_never_overwrites(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_dirs.set_aside(run) is None
    for number in (1, 2):
        run_dirs.claim(run, f"name = '{number}'\n")
        assert run_dirs.set_aside(run) == tmp_path / f"run.old-{number}"
        assert not run.exists()
    assert [(tmp_path / f"run.old-{n}" / "recipe.toml").read_text() for n in (1, 2)] == ["name = '1'\n", "name = '2'\n"]
    assert not list(tmp_path.rglob(LOCK))


def test_set_aside_leaves_a_running_run_and_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert run_dirs.set_aside(tmp_path) is None
    run = tmp_path / "run"
    run_dirs.claim(run, "name = 'x'\n")
    with holder(run) as pid, pytest.raises(UserError, match=f"pid {pid}"):
        run_dirs.set_aside(run)
    assert (run / "recipe.toml").exists()
