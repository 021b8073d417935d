"""A wheel, built from the checkout and installed elsewhere, has everything inside `lora_dpo` and works there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEGABYTE = 10**6


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # hatchling is installed with the tests' requirements: nothing is downloaded.
    script = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    return folder / run(sys.executable, "-c", script, cwd=ROOT).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    return target


def lora_dpo(installed: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run(
        sys.executable,
        "-m",
        "lora_dpo",
        *arguments,
        cwd=installed.parent,
        env=environment | {"PYTHONPATH": str(installed)},
    )


def test_nothing_lies_beside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lora_dpo"}
    assert "lora_dpo/_recipes/quickstart.toml" in names
    assert "lora_dpo/_app/__init__.py" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("lora_dpo/tests")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_tiny_world_is_in_it_and_all_is_below_60_megabytes(wheel: Path) -> None:
    tracked = [p for p in (ROOT / "lora_dpo" / "tinyworld").rglob("*") if p.suffix in {".safetensors", ".parquet"}]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {p.relative_to(ROOT).as_posix() for p in tracked} <= names
    assert wheel.stat().st_size <= 60 * MEGABYTE


def test_it_works_outside_the_checkout(installed: Path) -> None:
    rows = json.loads(lora_dpo(installed, "recipes", "ls", "--json"))
    assert {"quickstart", "sdxl_lora", "sd15_lora", "sd21_lora"} <= {row["name"] for row in rows}
    assert all(Path(row["path"]).is_relative_to(installed) for row in rows)
    assert json.loads(lora_dpo(installed, "check", "quickstart", "--json"))["ok"]


def test_its_version_is_the_packages(wheel: Path, installed: Path) -> None:
    assert lora_dpo(installed, "--version").split()[-1] == wheel.name.split("-")[1]
