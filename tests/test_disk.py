"""Real full and read-only disks, at every size: a clear line, nothing lost, and the same command goes on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_dpo import build, cli, recipe
from lora_dpo.errors import UserError
from tests.support.models import save_random_pairs, save_random_sd
from tests.test_survival import RECIPE, assert_same_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 12)
    (folder / "small.toml").write_text(RECIPE.format(folder=folder))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def train(world: Path, folder: Path, *overrides: str) -> build.Outcome:
    chosen = ["evaluate.prompts=1", "output.trackers=['tensorboard']", f'output.cache_dir="{folder / "cache"}"']
    return build.run(recipe.load(str(world / "small.toml"), [*chosen, *overrides]), folder / "run", quiet=True)


def attempt(world: Path, folder: Path) -> build.Outcome | UserError:
    try:
        return train(world, folder)
    except UserError as error:
        return error


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def test_a_disk_that_is_full_at_every_size(world: Path, disk: Path, tmp_path: Path, capfd) -> None:
    """From 16 KiB up, until the run is done: each time it goes on with what it could write before."""
    whole = train(world, tmp_path / "whole")
    needed, failures, size = used(tmp_path / "whole"), [], 16 << 10
    while isinstance(outcome := attempt(world, disk), UserError):
        assert outcome.exit_code == 1
        assert outcome.what == "no space left on the disk"
        failures.append(Path(str(outcome.where)).relative_to(disk).parts[0])
        assert not [path for path in disk.rglob("*.partial") if path.is_file()]
        assert size < 3 * needed, "it does not get on"
        size += max(16 << 10, needed // 8)
        remount(disk, f"size={size}")
    assert {"run", "cache"} <= set(failures)
    assert len(failures) >= 5
    assert outcome.result["steps"] == whole.result["steps"]
    ours = disk / "run" / "tensorboard"
    for path in [*ours.rglob("*"), *(tmp_path / "whole" / "run" / "tensorboard").rglob("*")]:
        path.unlink()  # named by time and process
    (disk / "run" / "trackers.json").write_bytes((tmp_path / "whole" / "run" / "trackers.json").read_bytes())
    assert_same_run(disk / "run", tmp_path / "whole" / "run")
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_that_can_not_be_written(world: Path, disk: Path, tmp_path: Path, capsys) -> None:
    remount(disk, "size=64m")
    train(world, disk)
    gc.collect()  # the cache is in use for as long as its pairs are held
    remount(disk, "ro")
    before = (disk / "run" / "result.json").read_bytes()
    assert train(world, disk).already  # what is finished is read
    with pytest.raises(UserError, match=r"can't be written \(Read-only file system\)") as error:
        train(world, disk, "evaluate.guidance=2")
    assert error.value.exit_code == 2
    assert "--run-dir" in str(error.value.hint)
    arguments = ["train", str(world / "small.toml"), f'output.cache_dir="{disk / "other"}"', "--quiet"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--run-dir", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "output.cache_dir" in capsys.readouterr().err  # the remedy for a cache
    remount(disk, "rw")
    assert (disk / "run" / "result.json").read_bytes() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be another user")
def test_a_directory_of_another_user() -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom lora_dpo.run_lock import locked\n"
        "from lora_dpo.errors import UserError\nos.setgid(65534); os.setuid(65534)\n"
        "try:\n    with locked(Path(sys.argv[1])):\n        pass\nexcept UserError as error:\n"
        "    print(error.exit_code, error)"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", script, folder], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout.startswith(f"2 {folder}/.lock: can't be written (Permission denied)"), done.stderr
