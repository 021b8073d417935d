"""A page of the documentation as its reader meets it: its commands, run in a folder that stands for the machine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.cli import download
from huggingface_hub.cli.hf import app as hf

from lora_dpo import cli, figures
from tests.support.models import png

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks in `docs/PAGE.md`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / f"{page}.md").read_text("utf-8"), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's shell blocks."""
    text = "\n".join(blocks(page, "sh"))
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def no_curves(patch: pytest.MonkeyPatch) -> None:
    """Runs without `curves.png`, a third of a small one's time; others test it."""
    patch.setattr(figures, "curves", lambda *_, **__: None)


def run(words: list[str], machine: Path, *more: str) -> int:
    """One command, in this process and the working directory `machine`; its exit code.

    `/data`, `/models` and the home are folders of `machine`. The small models there are not of their originals' sizes:
    `machine/settings` has the settings for one that is a single file.

    Args:
        more: arguments beside those on the page.
    """
    name, *arguments = [re.sub(r"^((?:[\w.]+=)?)(?:/(?=data/|models/)|~/)", r"\1", word) for word in words]
    match name:
        case "lora-dpo" if arguments[0] == "app":  # waits for a browser
            return 0
        case "lora-dpo":
            if any(word.startswith("base.model=") and word.endswith(".safetensors") for word in arguments):
                more = (*more, "base.config=settings")
            with pytest.raises(SystemExit) as caught:
                cli.main([*arguments, *more])
            return int(caught.value.code or 0)
        case "python":  # a benchmark, of an hour; tests of their own run them small
            return 0 if (DOCS.parent / arguments[0]).is_file() else 1
        case "pip":
            return 0 if arguments[0] == "install" else 1
        case "cp":
            source, target = arguments
            shutil.copy(machine / source, machine / target)
            return 0
        case "hf":
            _fetch(arguments, machine)
            return 0
    raise AssertionError(f"nobody runs {words}")


def save_jsonl(folder: Path, pairs: int) -> None:
    """Pairs of pictures with `pairs.jsonl` beside them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(pairs):
        sides = {"winner": f"{number}a.png", "loser": f"{number}b.png"}
        for file in sides.values():
            (folder / file).write_bytes(png(rng, 64))
        lines.append(json.dumps({"prompt": f"a ring no {number}", **sides}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))


def _fetch(arguments: list[str], machine: Path) -> None:
    """The hub's own command line, with a copy of what the reader's hub has for the transfer."""

    def transfer(*, repo_id: str, local_dir: str, allow_patterns: list[str], ignore_patterns: list[str], **_) -> str:
        (snapshot,) = (machine / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots").iterdir()
        files = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (machine / local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(snapshot / file, machine / local_dir / file)
        return local_dir

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "snapshot_download", transfer)
        hf([word.removeprefix("/") for word in arguments], standalone_mode=False)


def messages(page: str) -> list[str]:
    """What the page says that the program says: the quoted beginnings of its last section's points."""
    text = (DOCS / f"{page}.md").read_text("utf-8").split("## When something goes wrong")[1]
    return re.findall(r'^- \*\*"(.*?)"\*\*', text, re.M)


def all_messages() -> str:
    """The package's source, with texts that are written in several parts put together."""
    source = "".join(path.read_text("utf-8") for path in (DOCS.parent / "lora_dpo").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", source)
