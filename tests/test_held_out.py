"""Implicit preference on fixed draws: exact at the start, independent of the batch, of the paper's sign."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPair, CachedPairs, fill
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.evaluation.held_out import held_out
from lora_dpo.evaluation.statistics import wilson_interval
from lora_dpo.families import Moments
from lora_dpo.families.sdxl import SDXL
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.methods.stream import PairStream
from tests.support.models import save_random_pairs, save_random_sdxl


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("held-out")
    family = SDXL(save_random_sdxl(path / "sdxl"))
    source = PickAPicParquet(save_random_pairs(path / "pairs.parquet", 12))
    return family, fill(source, family, path / "cache", 64)


@pytest.fixture
def adapters(world):
    family, _ = world
    attached = Adapters.attach(family.denoiser, rank=2, alpha=2.0, seed=0)
    yield attached
    attached.detach()


def perturb(adapters: Adapters, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapters.parameters().items():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def test_without_an_update_there_is_no_preference(world, adapters):
    family, pairs = world
    result = held_out(family, adapters, pairs, beta=2000, draws=2)
    assert (result.accuracy, result.margin) == (0.5, 0.0)
    assert result.loss == pytest.approx(math.log(2), rel=1e-6)
    assert result.accuracy_ci95[0] < 0.5 < result.accuracy_ci95[1]
    assert (result.pairs, result.prompts, result.draws) == (12, len(pairs.prompts), 2)
    assert result.error_winner == result.ref_error_winner
    assert result.error_loser == result.ref_error_loser


def test_fixed_draws_whatever_the_batch_and_the_global_state(world, adapters):
    family, pairs = world
    perturb(adapters)
    one = held_out(family, adapters, pairs, beta=2000, draws=3, batch=12)
    torch.manual_seed(99)
    two = held_out(family, adapters, pairs, beta=2000, draws=3, batch=5)
    assert two.margin == pytest.approx(one.margin, rel=1e-3, abs=1e-3)
    assert two.accuracy == one.accuracy
    assert two.ref_error_winner == pytest.approx(one.ref_error_winner, rel=1e-5)
    other = held_out(family, adapters, pairs, beta=2000, draws=3, seed=1)
    assert other.ref_error_winner != pytest.approx(one.ref_error_winner, rel=1e-5)


class Rewritten(CachedPairs):
    """The pairs of a cache, each passed through a function."""

    def __init__(self, pairs: CachedPairs, change: Callable[[CachedPair], CachedPair]) -> None:
        self.__dict__.update(pairs.__dict__)
        self._change = change

    def pair(self, index: int) -> CachedPair:
        return self._change(super().pair(index))


def noise_free(pair: CachedPair) -> CachedPair:
    sides = {name: getattr(pair, name) for name in ("winner", "loser")}
    return replace(pair, **{name: Moments(m.mean, torch.zeros_like(m.std)) for name, m in sides.items()})


def swapped(pair: CachedPair) -> CachedPair:
    return CachedPair(pair.loser, pair.winner, pair.loser_geometry, pair.winner_geometry, pair.prompt)


def test_swapped_labels_mirror_the_result(world, adapters):
    """Up to the posterior samples, which each side draws for itself, hence noise-free moments here."""
    family, pairs = world
    perturb(adapters)
    forth = held_out(family, adapters, Rewritten(pairs, noise_free), beta=2000, draws=2)
    back = held_out(family, adapters, Rewritten(pairs, lambda pair: swapped(noise_free(pair))), beta=2000, draws=2)
    assert abs(forth.margin) > 1e-3
    assert back.margin == pytest.approx(-forth.margin, rel=1e-3)
    assert back.accuracy == 1 - forth.accuracy


def test_the_sign_is_the_papers(world, adapters):
    """A policy that is better on winners and worse on losers than the reference has a positive margin (eq. 46)."""
    family, pairs = world
    parameters = list(adapters.parameters().values())
    perturb(adapters, scale=0.01)
    before = held_out(family, adapters, pairs, beta=2000, draws=2)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    method = PairMethod(PairStream(pairs, family, seed=0, batch_pairs=12), family, adapters, Dpo(2000))
    for batch, _ in zip(method.batches(0), range(12), strict=False):
        optimizer.zero_grad()
        for part in batch.parts():
            method.loss(part).loss.backward()
        optimizer.step()
    after = held_out(family, adapters, pairs, beta=2000, draws=2)
    assert after.margin > before.margin
    gained = (after.error_winner - after.ref_error_winner) - (after.error_loser - after.ref_error_loser)
    assert after.margin == pytest.approx(-1000 * gained, rel=1e-3)


def test_limit_is_a_fixed_subset_and_json_is_plain(world, adapters):
    family, pairs = world
    perturb(adapters)
    result = held_out(family, adapters, pairs, beta=2000, draws=1, limit=5)
    assert result.pairs == 5
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["accuracy"] == result.accuracy
    if result.prompts == 5:
        assert result.accuracy_ci95 == wilson_interval(result.accuracy * 5, 5)


@pytest.mark.parametrize("options", [{"draws": 0}, {"batch": 0}, {"limit": 0}, {"timestep_range": (5, 5)}])
def test_bad_options(world, adapters, options):
    family, pairs = world
    with pytest.raises(UserError):
        held_out(family, adapters, pairs, beta=2000, **options)


def test_nan_names_the_pairs(world, adapters):
    family, pairs = world
    perturb(adapters, scale=float("nan"))
    with pytest.raises(LoraDpoError, match=min(pairs.keys)):
        held_out(family, adapters, pairs, beta=2000, draws=1)
