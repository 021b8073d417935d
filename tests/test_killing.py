"""Killed in the middle of anything and started again, a run of the tiny world ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the killer is written for Linux")
def test_killed_at_random_moments_and_started_again(tmp_path: Path) -> None:
    """`python -m tests.support.killing DIRECTORY --every 1 --clock 100` tries every file operation of a run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", str(tmp_path), "--kills", "20", "--seed", "7"],
        cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["different"] == []
    assert done.returncode == 0, done.stderr
    assert document["kills"] == 20
    assert {"loading", "cache", "training", "checkpoint", "export", "report"} <= set(document["phases"])
    assert any(event.startswith("torn") for event in document["last_events"])
