"""A repository as the hub's client keeps it: `models--OWNER--NAME/snapshots/REVISION` and what a branch points to."""

from __future__ import annotations

import shutil
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def keep(cache: Path, name: str, folder: Path, *, revision: str = REVISION, branch: str | None = "main") -> Path:
    """The folder's files as a snapshot of `name` ("OWNER/NAME"), and the branch's newest, if one is given."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(folder, snapshot)
    if branch is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(revision)
    return snapshot
