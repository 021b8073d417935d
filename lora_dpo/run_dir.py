"""The run directory: whose it is, whether it is finished, and how it becomes so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_dpo import atomic
from lora_dpo.errors import UserError

RECIPE, RESULT, METRICS = "recipe.toml", "result.json", "metrics.jsonl"
ADAPTER, KOHYA, SAMPLES = "adapter", "kohya", "samples"
GRID, CURVES, CARD = "before_after.png", "curves.png", "README.md"


def claim(run_dir: Path, recipe: str, differences: Callable[[Path], list[str]]) -> dict[str, Any] | None:
    """Makes the directory this recipe's; the result, if the run is finished with just this recipe.

    Keys of `evaluate` may differ: the recipe is then replaced and the result taken away, while all that was trained
    stays.

    Args:
        recipe: the resolved recipe as TOML.
        differences: which keys of the recipe in a file differ from this one's, where that matters.

    Raises:
        UserError: the directory belongs to another recipe, holds other things, or can't be written.
    """
    held = run_dir / RECIPE
    with atomic.clear_os_errors(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError("this is a file", where=run_dir, hint="give a folder as --run-dir")
        if held.exists():
            differing = differences(held)
            others = [key for key in differing if not key.startswith("evaluate.")]
            # A run that failed before its first step, on a wrong path for instance, has nothing to lose.
            if others and (run_dir / METRICS).exists():
                raise UserError(
                    f"this run directory belongs to another recipe, which differs in {', '.join(others)}",
                    where=run_dir,
                    hint=f"give another --run-dir, or train the recipe that is there: {held}",
                )
            if not differing and (result := read_result(run_dir)) is not None:
                return result
        elif run_dir.is_dir() and (names := sorted(p.name for p in run_dir.iterdir() if not p.name.startswith("."))):
            raise UserError(
                f"this folder is no run directory: it holds {', '.join(names[:3])} and no {RECIPE}",
                where=run_dir,
                hint="give a new or an empty folder as --run-dir",
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        # The result first: it must never stand beside a recipe that it doesn't belong to.
        (run_dir / RESULT).unlink(missing_ok=True)
        atomic.replace(held, recipe.encode())
    return None


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None if there is none, which means that the run is not finished."""
    try:
        return json.loads((run_dir / RESULT).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"damaged ({error})", where=run_dir / RESULT, hint="delete it: the run is then completed"
        ) from None


def finish(run_dir: Path, result: dict[str, Any]) -> None:
    """Writes the result: the last thing a run does."""
    with atomic.clear_os_errors(run_dir):
        atomic.replace(run_dir / RESULT, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())


def train_seconds(run_dir: Path, up_to_step: int) -> float:
    """Time spent in the optimizer steps 1 … `up_to_step`, over all calls that the run took."""
    with (run_dir / METRICS).open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return sum((line["seconds"] for line in lines if line["step"] <= up_to_step), 0.0)
