"""One image at a time: the plain pass's gradient, losses and metrics, with half of its activations."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lora_dpo import parts, recipe
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods import losses
from lora_dpo.methods.objectives import Dpo, Objective, PairErrors, Sft
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.recompute import recompute
from lora_dpo.step import autocast
from tests.support.toy import Run
from tests.support.training import World, attach, make_world, stream

BETA = 500.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion, prediction_type="v_prediction")


@dataclass(frozen=True)
class Everything(Objective):
    """Both sides' errors and shifts, in a way that couples them all."""

    needs = frozenset({"loser", "reference", "shift", "overlap"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        u = losses.margin(*errors.four, BETA)
        return torch.sigmoid(-u) * (errors.shift_winner + 2 * errors.shift_loser) + errors.overlap * errors.winner


@dataclass(frozen=True)
class Squared(Objective):
    """Its gradient is 0 where all errors are equal."""

    needs = frozenset({"loser"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return (errors.winner - errors.loser).square()


OBJECTIVES = {"dpo": Dpo(BETA), "sft": Sft(), "everything": Everything(), "squared": Squared()}


def method(world: World, objective: Objective, **options):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=0.2, **options)
    drawn = stream(pairs, family, batch_pairs=4)
    return adapters, [PairMethod(drawn, family, adapters, objective, pair_pass=way) for way in ("plain", "split")]


def gradient(method: PairMethod, adapters, micro_batch_pairs=4, scope=nullcontext):
    for parameter in adapters.parameters().values():
        parameter.grad = None
    found = [method.backward(part, scope) for part in method._stream.batch(0).parts(micro_batch_pairs)]
    return [parameter.grad for parameter in adapters.parameters().values()], found


def assert_close(one, other, *, rtol, atol):
    largest = max(grad.abs().max().item() for grad in other)
    assert largest > 0
    for got, want in zip(one, other, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol * largest)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_the_plain_one(world, name):
    adapters, (plain, split) = method(world, OBJECTIVES[name])
    wanted, (whole,) = gradient(plain, adapters)
    for size in (4, 2):
        got, parts = gradient(split, adapters, size)
        assert_close(got, wanted, rtol=1e-3, atol=2e-5)
        assert len(parts) == 4 // size
        torch.testing.assert_close(sum(part.loss for part in parts), whole.loss.detach(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(torch.cat([part.per_pair for part in parts]), whole.per_pair, rtol=1e-3, atol=1e-6)
        for key, total in whole.sums.items():
            torch.testing.assert_close(sum(part.sums[key] for part in parts), total, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dpo", "everything"])
def test_with_checkpointing_and_in_bfloat16(world, name):
    adapters, (plain, split) = method(world, OBJECTIVES[name])
    scope = partial(autocast, torch.device("cpu"), "bfloat16")
    wanted, _ = gradient(plain, adapters, scope=scope)
    recompute(plain._family.denoiser, "full")
    got, _ = gradient(split, adapters, scope=scope)
    # bfloat16 has three digits, and the passes round in another order.
    flat, other = (torch.cat([grad.flatten() for grad in grads]) for grads in (got, wanted))
    assert torch.nn.functional.cosine_similarity(flat, other, dim=0) > 0.99
    assert 0.9 < (flat.norm() / other.norm()).item() < 1.1


def test_the_first_step_is_exact(world):
    """B = 0: policy and reference see one image each, and agree to the bit."""
    adapters, (_, split) = method(world, Dpo(5000.0))
    for name, parameter in adapters.parameters().items():
        if ".lora_B." in name:
            parameter.data.zero_()
    _, (found,) = gradient(split, adapters)
    assert found.sums["margin"].item() == 0.0
    assert found.sums["implicit_accuracy"].item() == 2.0


def test_dropout_repeats_and_differs_between_images(world):
    adapters, (_, split) = method(world, Dpo(BETA), dropout=0.5)
    adapters.train()
    torch.manual_seed(1)
    one, (first,) = gradient(split, adapters)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))  # the pass left the global state as it was
    two, (second,) = gradient(split, adapters)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(first.per_pair, second.per_pair)
    adapters.train(False)
    _, (off,) = gradient(split, adapters)
    assert not torch.equal(off.per_pair, first.per_pair)
    assert torch.equal(off.sums["ref_error_winner"], first.sums["ref_error_winner"])
    # An image's masks are its own, wherever its pair stands in the batch.
    adapters.train()
    alone = list(split._stream.batch(0).parts(1))[2]
    assert torch.equal(split.backward(alone).per_pair, first.per_pair[2:3])


class Kept:
    """The most bytes that autograd keeps for backward at a time, without those of parameters."""

    def __init__(self) -> None:
        self.peak = 0
        self._alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        self._alive.add(held)
        kept = {h.tensor.untyped_storage().data_ptr(): h.tensor.untyped_storage().nbytes() for h in self._alive
                if not h.is_weight}  # fmt: skip
        self.peak = max(self.peak, sum(kept.values()))
        return held


class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.is_weight = isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter)


@pytest.mark.parametrize("name", ["dpo", "everything"])
def test_one_images_activations_are_kept(world, name):
    _, (plain, split) = method(world, OBJECTIVES[name])

    def peak(of: PairMethod, pairs: int) -> int:
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            of.backward(next(of._stream.batch(0).only(slice(pairs)).parts()))
        return kept.peak

    one_pair = peak(plain, 1)
    assert 0.45 < peak(split, 1) / one_pair < 0.56
    assert 0.45 < peak(split, 3) / one_pair < 0.56
    assert 2.8 < peak(plain, 3) / one_pair < 3.2


RECIPE = """
[data]
path = "{world.data}"
resolution = 64
[base]
family = "stable_diffusion"
model = "{world.base}"
[method]
kind = "dpo"
[train]
batch_pairs = 3
"""


@pytest.mark.parametrize(("way", "passes"), [("plain", [6, 6]), ("split", [1] * 12)])
def test_the_recipe_chooses(world, tmp_path, monkeypatch, way, passes):
    (tmp_path / "small.toml").write_text(RECIPE.format(world=world))
    loaded = recipe.load(str(tmp_path / "small.toml"), [f"train.pair_pass={way}"])
    family = world.family()
    chosen = parts.method(loaded, world.pairs(family), family, attach(family))
    seen, predict = [], family.predict
    monkeypatch.setattr(family, "predict", lambda x_t, *rest: seen.append(len(x_t)) or predict(x_t, *rest))
    chosen.backward(next(next(chosen.batches(0)).parts()))
    assert seen == passes


def test_a_run_may_change_the_way(tmp_path):
    """As it may change the micro-batch: what is learned is the same."""
    whole = Run(tmp_path / "whole")
    whole.train()
    Run(tmp_path / "parts").train(3)
    resumed = Run(tmp_path / "parts")
    resumed.method._pair_pass = "split"
    assert resumed.train().resumed_from == 3
    for name, value in whole.adapters.state_dict().items():
        torch.testing.assert_close(resumed.adapters.state_dict()[name], value, rtol=1e-3, atol=1e-5)
