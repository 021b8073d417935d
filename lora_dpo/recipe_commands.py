"""`lora-dpo recipes …`: show and copy what the package ships."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lora_dpo.errors import UserError
from lora_dpo.recipe_toml import find, shipped_names

group = typer.Typer(no_args_is_help=True, help="The recipes that come with the package.")


@group.command("ls")
def ls(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")
    ] = False,
) -> None:
    """List the shipped recipes."""
    rows = [{"name": name, "path": str(find(name)), "about": _first_comment(find(name))} for name in shipped_names()]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['about']}")


def _first_comment(path: Path) -> str:
    line = path.read_text("utf-8").split("\n", 1)[0]
    return line.lstrip("# ").strip() if line.startswith("#") else ""


@group.command("cat")
def cat(name: str) -> None:
    """Print a shipped recipe."""
    print(find(name).read_text("utf-8"), end="")


@group.command("cp")
def cp(
    name: str,
    destination: Annotated[Path, typer.Argument(help="A file or a folder.")] = Path(),
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite a file.")] = False,
) -> None:
    """Copy a shipped recipe, to be changed."""
    source = find(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise UserError("there is a file already", where=target, hint="give another name, or --force")
    if not target.parent.is_dir():
        raise UserError("no such folder", where=target.parent)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    print(target)
