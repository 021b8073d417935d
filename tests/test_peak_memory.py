"""A phase's own peak, not that of all before it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_dpo import peak_memory
from tests.support.toy import Run
from tests.test_train import lines

CPU = torch.device("cpu")


def resident_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**20


def use_a_quarter() -> None:
    torch.ones(2**26)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak can't be set back")
def test_it_counts_from_the_restart():
    peak_memory.restart(CPU)
    before = peak_memory.gib(CPU)
    use_a_quarter()
    assert peak_memory.gib(CPU) > before + 0.2
    peak_memory.restart(CPU)
    assert peak_memory.gib(CPU) == pytest.approx(resident_gib(), abs=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak can't be set back")
def test_what_was_in_use_before_training_is_not_training_s(tmp_path):
    use_a_quarter()
    high = peak_memory.gib(CPU)
    run = Run(tmp_path)
    result = run.train(2)
    assert result.peak_memory_gib < high - 0.1
    assert [line["peak_memory_gib"] for line in lines(tmp_path)] == pytest.approx([result.peak_memory_gib] * 2, rel=0.1)


def test_where_it_can_not_be_set_back_it_goes_on_counting(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    peak_memory.restart(CPU)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert peak_memory.gib(CPU) > 0.01
