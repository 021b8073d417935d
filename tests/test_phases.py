"""One kind of network at a time: what is in memory whenever another one is loaded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_dpo import build, caching, recipe
from lora_dpo.families.files import ModelFiles
from lora_dpo.families.folder import PipelineFolder
from lora_dpo.families.single_file import SingleFile
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl
from tests.support.single_file import save_single_file
from tests.test_cache_command import RECIPE

TEXTS = {"text_encoder", "text_encoder_2"}
VAE, UNET = {"vae"}, {"unet"}


class Watched:
    """Every network that is loaded.

    Attributes:
        loads: what was loaded, and what else was in memory then.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.loads: list[tuple[str, set[str]]] = []
        self._made: list[tuple[str, Any]] = []
        for kind in (PipelineFolder, SingleFile):
            for method in ("vae", "unet", "text_encoder"):
                patch.setattr(kind, method, self._watching(getattr(kind, method), method))

    def alive(self) -> set[str]:
        """Networks of which any weight is in memory; nobody's garbage collection is waited for."""
        return {name for name, weights in self._made if any(weight() is not None for weight in weights)}

    def _watching(self, load: Any, method: str) -> Any:
        def watched(files: ModelFiles, *arguments: Any, **more: Any) -> nn.Module:
            name = arguments[1] if method == "text_encoder" else method
            self.loads.append((name, self.alive()))
            network = load(files, *arguments, **more)
            self._made.append((name, [weakref.ref(weight) for weight in network.parameters()]))
            return network

        return watched

    def phases(self) -> Iterator[set[str]]:
        """Neighbouring loads of one kind together."""
        last: set[str] = set()
        for name, _ in self.loads:
            kind = TEXTS if name in TEXTS else {name}
            if kind != last:
                yield kind
            last = kind


@pytest.fixture(params=["sdxl", "stable_diffusion from one file"])
def world(request, tmp_path: Path) -> Path:
    family = request.param.partition(" ")[0]
    base = (save_random_sdxl if family == "sdxl" else save_random_sd)(tmp_path / "base")
    save_random_pairs(tmp_path / "pairs.parquet", 20)
    text = RECIPE.format(cache=tmp_path / "cache").replace('"sdxl"', f'"{family}"')
    if "file" in request.param:
        save_single_file(base, tmp_path / "base.safetensors")
        text = text.replace('model = "base"', 'model = "base.safetensors"\nconfig = "base"')
    (tmp_path / "small.toml").write_text(text)
    return tmp_path


@pytest.fixture
def watched(monkeypatch) -> Iterator[Watched]:
    gc.disable()  # what is in a cycle stays, unless it is collected on purpose
    try:
        yield Watched(monkeypatch)
    finally:
        gc.enable()


def of_one_kind(loads: list[tuple[str, set[str]]]) -> bool:
    return all(alive <= (TEXTS if name in TEXTS else set()) for name, alive in loads)


def test_training_has_one_kind_of_network_in_memory(world: Path, watched: Watched, monkeypatch) -> None:
    learn, at_start = build.train, []

    def learns(**settings: Any) -> Any:
        at_start.append((len(watched.loads), watched.alive()))
        return learn(**settings)

    monkeypatch.setattr(build, "train", learns)
    build.run(recipe.load(str(world / "small.toml")), world / "run", quiet=True)
    [(before, alive)] = at_start
    assert alive == UNET
    assert list(watched.phases())[:5] == [VAE, TEXTS, VAE, TEXTS, UNET]  # to train on, held out, training
    assert of_one_kind(watched.loads[:before])
    assert watched.loads[before - 1] == ("unet", set())


def test_filling_leaves_nothing_and_loads_no_denoiser(world: Path, watched: Watched) -> None:
    settings = recipe.load(str(world / "small.toml"))
    caching.run(settings, caching.Wanted(), quiet=True)
    assert watched.alive() == set()
    assert list(watched.phases()) == [VAE, TEXTS, VAE, TEXTS]
    assert of_one_kind(watched.loads)
    loads = len(watched.loads)
    caching.run(settings, caching.Wanted(verify=True, prune=True, stats=True), quiet=True)
    caching.run(settings, caching.Wanted(), quiet=True)
    build.run(recipe.load(str(world / "small.toml")), world / "run", quiet=True)
    assert watched.loads[loads] == ("unet", set())
