"""Ctrl-C where it is typed: on a terminal with a progress bar, and while no Python code runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_dpo import checkpoint
from lora_dpo.stopping import GRACE_SECONDS
from tests.support.models import save_random_pairs, save_random_sd
from tests.test_survival import RECIPE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Interrupted once, and then twice in a row."""
    folder = tmp_path_factory.mktemp("terminal")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 12)
    (folder / "small.toml").write_text(RECIPE.format(folder=folder))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.terminal", str(folder / "small.toml"), str(folder / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"LORA_DPO_CACHE": str(folder / "cache"), "CI": "", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run", [json.loads(line) for line in done.stdout.splitlines()]


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_the_first_ctrl_c_saves_and_says_so(runs) -> None:
    run_dir, (first, _) = runs
    text = plain(first["shown"])
    assert first["code"] == 130
    assert "stopping after this step; once more to stop at once, unsaved" in text
    [saved] = re.findall(r"lora-dpo: interrupted; step (\d+) of 100000 is saved in", text)
    assert int(saved) in checkpoint.steps(run_dir)
    assert text.rstrip().endswith("→ run the same command again to resume")
    assert "Traceback" not in text


def test_the_second_leaves_at_once_without_saving(runs) -> None:
    run_dir, (first, second) = runs
    text = plain(second["shown"])
    assert second["code"] == 130
    assert second["seconds"] < 10
    [saved] = re.findall(r"interrupted; step (\d+) of 100000 is saved in", plain(first["shown"]))
    assert f"resumed at step {saved} of 100000" in text
    assert f"interrupted; step {saved} of 100000 is saved" in text
    assert checkpoint.steps(run_dir) == [int(saved)]


def test_the_terminal_is_as_before(runs) -> None:
    for one in runs[1]:
        shown = one["shown"]
        assert "\x1b[?25l" in shown  # the bar hides the cursor
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_ends_a_process_that_runs_no_python_code(launched: bool) -> None:
    """One call into a library that never comes back; by a launcher signals come twice, and count as one."""
    script = (
        "import hashlib, sys\nfrom lora_dpo.stopping import at_once, stoppable\n"
        "with at_once(), stoppable():\n    print('begun', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2" if launched else ""}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            for pause in (0.5, 0.5) if not launched else (0.5, 0.1, 3.2):
                time.sleep(pause)
                process.send_signal(signal.SIGTERM)
            error = process.communicate(timeout=GRACE_SECONDS + 20)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error == "lora-dpo: stopped at once; the same command resumes where it can\n"


def test_one_signal_does_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\nfrom lora_dpo.stopping import at_once, stop_requests\n"
        "with at_once(), stop_requests() as asked:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        f"    time.sleep({GRACE_SECONDS + 1})\n    print('asked', asked())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "asked 2\n"), done.stderr
