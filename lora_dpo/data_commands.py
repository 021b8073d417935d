"""`lora-dpo data …`: look at preference data before anything is trained with them."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

group = typer.Typer(no_args_is_help=True, help="Look at preference data before training with them.")


@group.command("check")
def check(
    target: Annotated[
        str,
        typer.Argument(metavar="RECIPE|PATH", help="A recipe, or a file or directory of pairs, known by its content."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Of a recipe: replace single keys.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Write every row that is left out here, one JSON a line."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="FILE.png", help="Draw random pairs here, winners marked.")
    ] = None,
    sheet_pairs: Annotated[int, typer.Option("--sheet-pairs", min=1, max=200, help="How many of them.")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="Of the pairs on the sheet.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")
    ] = False,
) -> None:
    """Read all the pairs once: what is kept, what is dropped and why, duplicates, label noise, sizes, users, models.

    Exit code 1 if no pair can be used, or a file is damaged.
    """
    from lora_dpo.data_table import text

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        from lora_dpo import data_check

        found = data_check.run(
            target, overrides or [], rows_file=rows, sheet=sheet, sheet_pairs=sheet_pairs, seed=seed, quiet=quiet
        )
    shown = json.dumps(found, indent=2, ensure_ascii=False) if as_json else text(found)
    # A file's name may be of bytes that no text stands for.
    print(shown.encode("utf-8", "backslashreplace").decode("utf-8"))
    raise typer.Exit(0 if found["error"] is None else 1)
