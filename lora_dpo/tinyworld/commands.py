"""`lora-dpo tinyworld …`: make, measure and check what the package ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LoraDpoError

group = typer.Typer(no_args_is_help=True, help="Make, measure and check the embedded model and its preferences.")
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]
Base = Annotated[Path | None, typer.Option(help="Folder of the base model. Default: the shipped one.")]


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@group.command()
def pretrain(directory: Annotated[Path, typer.Argument(help="Where the stages and the model go; resumes.")]) -> None:
    """Make the base model from nothing: about an hour and a half on two cores."""
    from .pretrain import pretrain as run

    print(run(directory, log=_log))


@group.command()
def preferences(
    target: Annotated[Path, typer.Argument(help="The parquet file to write; resumes.")], base: Base = None
) -> None:
    """Sample the preference set from the base and let the annotators judge it: about twenty minutes on two cores."""
    from . import base_path
    from .preferences import make

    print(make(base or base_path(), target, log=_log))


@group.command()
def score(
    base: Base = None,
    lora: Annotated[Path | None, typer.Option(help="An adapter's .safetensors file, or its folder.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=200, help="How many held-out prompts.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 10,
    guidance: Annotated[float, typer.Option(min=1.0)] = 5.0,
    as_json: Json = False,
) -> None:
    """Sample held-out prompts and measure every score from the pixels."""
    from . import base_path
    from .scoring import score_base

    rows = score_base(base or base_path(), lora, prompts=prompts, seeds=seeds, steps=steps, guidance=guidance)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for name, value in rows.items():
        print(f"{name:<16} {value:.3f}" if isinstance(value, float) else f"{name:<16} {value}")


@group.command()
def verify(as_json: Json = False) -> None:
    """Compare the shipped weights and data with their released checksums."""
    from . import changed_files

    changed = changed_files()
    if as_json:
        print(json.dumps({"ok": not changed, "changed": changed}))
    elif not changed:
        print("weights and preferences are as released")
    if changed:
        raise LoraDpoError(f"missing or changed: {', '.join(changed)}\n  → install lora-dpo again")
