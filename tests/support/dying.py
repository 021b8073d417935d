"""A run that dies in the middle of a step, as far as one process can show it, and is started again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_dpo import build
from lora_dpo.recipe import Recipe


class Killed(BaseException):
    """Nothing in the package may catch it, as nothing can catch SIGKILL."""


def killed_and_resumed(settings: Recipe, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, step: int = 4) -> Path:
    """The run directory of a finished run that AdamW's step number `step`, from 1, had ended."""
    real, calls = torch.optim.AdamW.step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying)
        with pytest.raises(Killed):
            build.run(settings, run_dir, quiet=True)
    build.run(settings, run_dir, quiet=True)
    return run_dir
