"""The embedded default: a small world in which truth can be measured from pixels, its base model and preferences.

`scenes` draws what a picture shows and writes its caption, `render` draws it, `verifier` measures from pixels whether a
caption holds and how a picture looks, `taste` turns that into preferences. `pretrain` makes the base model and
`preferences` the preference set; their products are shipped inside the package.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..errors import LoraDpoError

HERE = Path(__file__).parent
CHECKSUMS = HERE / "checksums.json"


def base_path() -> Path:
    """The folder of the shipped base model, a diffusers `StableDiffusionXLPipeline`."""
    return _shipped("base")


def preferences_path() -> Path:
    """The shipped preference set, parquet in Pick-a-Pic's columns."""
    return _shipped("preferences.parquet")


def _shipped(name: str) -> Path:
    path = HERE / name
    if not path.exists():
        raise LoraDpoError(f"{path} is missing from this installation; install lora-dpo again")
    return path


def checksums(root: Path = HERE) -> dict[str, str]:
    """SHA-256 of every shipped weight and data file, by its path relative to the package's `tinyworld` folder."""
    files = [*sorted((root / "base").rglob("*.*")), root / "preferences.parquet"]
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def changed_files() -> list[str]:
    """Shipped files that are missing or differ from what was released; empty when all is well."""
    expected: dict[str, str] = json.loads(CHECKSUMS.read_text())
    found = checksums()
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
