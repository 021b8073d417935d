"""The run directory: whose it is, whether it is finished, and how it becomes so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lora_dpo import atomic
from lora_dpo.errors import UserError
from lora_dpo.metrics_file import HELD_OUT
from lora_dpo.run_lock import LOCK, locked

RECIPE, RESULT, METRICS = "recipe.toml", "result.json", "metrics.jsonl"
ADAPTER, KOHYA, SAMPLES = "adapter", "kohya", "samples"
RECOMPUTED = "recomputed.json"
GRID, CURVES, CARD = "before_after.png", "curves.png", "README.md"


class Differences(NamedTuple):
    """Where the recipe of a run and the one that is to be trained differ, key by key, with both values.

    Attributes:
        learned: in what is learned: the run can't go on with this recipe.
        other: in the rest: what was trained stays, and what comes after it is made anew.
    """

    learned: list[str]
    other: list[str]


def finished(run_dir: Path, differences: Callable[[Path], Differences]) -> dict[str, Any] | None:
    """The result, if the run in this directory is finished with just this recipe. Nothing is written.

    Args:
        differences: of the recipe in a file.

    Raises:
        UserError: the directory belongs to another recipe, or holds other things.
    """
    held = run_dir / RECIPE
    with atomic.clear_os_errors(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError("this is a file", where=run_dir, hint="give a folder as --run-dir")
        if held.exists():
            differing = differences(held)
            # A run that failed before its first step, on a wrong path for instance, has nothing to lose.
            if differing.learned and begun(run_dir):
                raise UserError(
                    f"this run directory belongs to another recipe: {'; '.join(differing.learned)}",
                    where=run_dir,
                    hint=f"give another --run-dir, train the recipe that is there ({held}), or start over with --fresh",
                )
            return None if any(differing) else _complete_result(run_dir)
        if run_dir.is_dir() and (names := sorted(p.name for p in run_dir.iterdir() if not p.name.startswith("."))):
            raise UserError(
                f"this folder is no run directory: it holds {', '.join(names[:3])} and no {RECIPE}",
                where=run_dir,
                hint="give a new or an empty folder as --run-dir",
            )
    return None


def begun(run_dir: Path) -> bool:
    """Whether a run has made, or is about to make, its first step here."""
    return (run_dir / METRICS).exists()


def claim(run_dir: Path, recipe: str) -> None:
    """Makes the directory this recipe's: the recipe is replaced and the result taken away; what was trained stays.

    Call it under the directory's lock, after `finished`.

    Args:
        recipe: the resolved recipe as TOML.

    Raises:
        UserError: the directory can't be written.
    """
    with atomic.clear_os_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        _remove_partial_files(run_dir)
        # The result first: it must never stand beside a recipe that it doesn't belong to.
        (run_dir / RESULT).unlink(missing_ok=True)
        atomic.replace(run_dir / RECIPE, recipe.encode())


def set_aside(run_dir: Path) -> Path | None:
    """Renames a run directory to the first free of `NAME.old-1`, `NAME.old-2`, …; None if there is none to rename.

    Raises:
        UserError: a process is at work in it, it holds other things than a run, or it can't be renamed.
    """
    if not (run_dir / RECIPE).exists():
        return None
    run_dir = Path(os.path.abspath(run_dir))
    with locked(run_dir), atomic.clear_os_errors(run_dir):
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
            number += 1
        run_dir.rename(aside)
        (aside / LOCK).unlink(missing_ok=True)
        atomic.sync_directory(run_dir.parent)
    return aside


def _remove_partial_files(run_dir: Path) -> None:
    """What a killed process was writing."""
    for folder in (run_dir, *(run_dir / name for name in (ADAPTER, KOHYA, SAMPLES))):
        for partial in folder.glob(".*.partial"):
            partial.unlink()


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


def _complete_result(run_dir: Path) -> dict[str, Any] | None:
    """As `read_result`; None too if an adapter that it names is gone, which is then written anew."""
    result = read_result(run_dir)
    names = [result.get("adapter"), result.get("adapter_kohya")] if result is not None else []
    return result if all((run_dir / name).is_file() for name in names if name) else None


def finish(run_dir: Path, result: dict[str, Any]) -> None:
    """Writes the result: the last thing a run does."""
    with atomic.clear_os_errors(run_dir):
        atomic.replace(run_dir / RESULT, (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())


def train_seconds(run_dir: Path, up_to_step: int) -> float:
    """Time spent in the optimizer steps 1 … `up_to_step`, over all calls that the run took."""
    return sum((line["seconds"] for line in _lines(run_dir) if line["step"] <= up_to_step), 0.0)


def training_gib(run_dir: Path) -> float:
    """The most memory in use while training, over all calls that the run took."""
    return max((line["peak_memory_gib"] for line in _lines(run_dir)), default=0.0)


def held_out_by_step(run_dir: Path) -> list[dict[str, float]]:
    """What was measured on held-out pairs while training."""
    found = []
    for line in _lines(run_dir):
        if f"{HELD_OUT}accuracy" in line:
            found.append({name: line[key] for name, key in _ON_HELD_OUT.items()})
    return found


_ON_HELD_OUT = {"step": "step", "accuracy": f"{HELD_OUT}accuracy", "margin": f"{HELD_OUT}margin"}


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    with (run_dir / METRICS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
