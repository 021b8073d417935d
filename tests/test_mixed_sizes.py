"""Training on pairs of several sizes: who comes when, the gradient, the held-out numbers, and a resumed run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, export, parts, recipe
from lora_dpo.cache import CachedPairs
from lora_dpo.data.framing import Framing
from lora_dpo.distributed import Processes
from lora_dpo.evaluation.held_out import held_out
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from tests.support.training import PAIRS, attach, make_mixed_world, stream


@pytest.fixture(scope="module", params=[SDXL, StableDiffusion], ids=["sdxl", "sd"])
def world(request, tmp_path_factory):
    return make_mixed_world(tmp_path_factory.mktemp("mixed"), request.param)


@pytest.fixture(scope="module")
def family(world):
    return world.family()


@pytest.fixture(scope="module")
def pairs(world, family) -> CachedPairs:
    return world.pairs(family)


@pytest.fixture
def adapters(family):
    attached = attach(family, moved=0.3)
    yield attached
    attached.detach()


def test_a_pairs_size_does_not_decide_when_it_comes(pairs, family):
    taken = stream(pairs, family, batch_pairs=4)
    permuted = [int(index) for epoch in range(2) for index in taken._permutation(epoch)]
    for step in range(5):
        batch = taken.batch(step)
        assert sorted(batch.indices) == sorted(permuted[4 * step : 4 * step + 4])
        sizes = [pairs.size(index) for index in batch.indices]
        assert sizes == sorted(sizes)
        assert batch.indices == stream(pairs, family, batch_pairs=4).batch(step).indices
    visits = Counter(
        (index, visit)
        for step in range(5)
        for index, visit in zip(taken.batch(step).indices, taken.batch(step).visits, strict=True)
    )
    assert visits == Counter({(index, visit): 1 for index in range(PAIRS) for visit in range(2)})


@pytest.mark.parametrize(("micro", "lengths"), [(None, [2, 4, 4]), (1, [1] * 10), (3, [2, 3, 1, 3, 1])])
def test_a_part_holds_one_size(pairs, family, micro, lengths):
    batch = stream(pairs, family, batch_pairs=PAIRS).batch(0)
    made = list(batch.parts(micro))
    assert [len(part) for part in made] == lengths
    assert [key for part in made for key in part.keys] == batch.keys
    for part in made:
        (size,) = {pairs.size(pairs.keys.index(key)) for key in part.keys}
        shape = [side // family.latent_scale for side in size]
        for tensor in (part.x_0_winner, part.x_0_loser, part.noise):
            assert list(tensor.shape[2:]) == shape


def test_draws_belong_to_the_pair_whatever_is_beside_it(pairs, family):
    taken = stream(pairs, family, batch_pairs=PAIRS)
    batch = taken.batch(0)
    for part in batch.parts(3):
        for place, key in enumerate(part.keys):
            alone = taken.part([pairs.keys.index(key)], [0], batch_pairs=1)
            for name in ("x_0_winner", "x_0_loser", "noise", "t"):
                assert torch.equal(getattr(alone, name)[0], getattr(part, name)[place])


def gradient(method, adapters, batches, micro):
    for parameter in adapters.parameters().values():
        parameter.grad = None
    total = 0.0
    for batch in batches:
        for part in batch.parts(micro):
            loss = method.loss(part).loss
            loss.backward()
            total += loss.item()
    return {name: parameter.grad.clone() for name, parameter in adapters.parameters().items()}, total


def assert_close(one, other):
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert max(tensor.abs().max() for tensor in one[0].values()) > 0
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, other[0][name], rtol=2e-3, atol=2e-5 * tensor.abs().max().item() + 1e-8)


def test_the_gradient_is_that_of_the_pairs_however_they_are_cut(pairs, family, adapters):
    method = PairMethod(stream(pairs, family, batch_pairs=8), family, adapters, Dpo(500.0))
    batch = next(method.batches(1))
    whole = gradient(method, adapters, [batch], None)
    for micro in (1, 3):
        assert_close(whole, gradient(method, adapters, [batch], micro))
    two, shares = Processes(), []
    for rank in range(2):
        two.count, two.rank = 2, rank
        shares.append(batch.only(two.share(len(batch))))
    assert [len(share) for share in shares] == [4, 4]
    assert_close(whole, gradient(method, adapters, shares, None))
    # Each pair by itself, without anything that groups them.
    loose = [replace(batch, indices=[i], visits=[v]) for i, v in zip(batch.indices, batch.visits, strict=True)]
    assert_close(whole, gradient(method, adapters, loose[::-1], None))


def test_held_out_numbers_do_not_depend_on_the_batch(pairs, family, adapters):
    one, many = (held_out(family, adapters, pairs, beta=500, draws=1, batch=batch) for batch in (1, 3))
    assert one.pairs == PAIRS
    assert many.accuracy == one.accuracy
    assert many.margin == pytest.approx(one.margin, rel=1e-3, abs=1e-4)
    assert many.error_loser == pytest.approx(one.error_loser, rel=1e-5)
    # The first ones by key, whatever their sizes.
    limited = held_out(family, adapters, pairs, beta=500, draws=1, limit=5)
    keys = set(sorted(pairs.keys)[:5])
    assert limited.pairs == 5
    prompts = {pairs.prompt_index(index) for index in range(PAIRS) if pairs.keys[index] in keys}
    assert limited.prompts == len(prompts)


def test_an_exports_probe_takes_pairs_of_one_size(pairs, family):
    probe = export.probe(pairs, family, count=3)
    alike = [index for index in range(PAIRS) if pairs.size(index) == pairs.size(0)][:3]
    assert alike != [0, 1, 2]
    assert probe.x_t.shape[0] == 3
    assert list(probe.x_t.shape[2:]) == [side // family.latent_scale for side in pairs.size(0)]
    assert len(export.probe(pairs, family, count=99).t) == sum(pairs.size(i) == pairs.size(0) for i in range(PAIRS))


RECIPE = """
name = "mixed"
[data]
path = "{data}"
heldout_fraction = 0.3
resolution = {resolution}
aspect = "buckets"
bucket_step_pixels = {step}
[base]
family = "{family}"
model = "{base}"
[adapter]
rank = 2
[method]
kind = "dpo"
[train]
steps = 5
batch_pairs = 4
micro_batch_pairs = 2
learning_rate = 1e-2
save_every_steps = 2
device = "cpu"
[evaluate]
prompts = 1
steps = 1
guidance = 1
implicit_pairs = 4
every_steps = 3
every_steps_pairs = 3
[output]
cache_dir = "{cache}"
"""


@pytest.fixture(scope="module")
def written(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mixed.toml"
    framing = world.framing
    path.write_text(
        RECIPE.format(
            data=world.data, base=world.base, cache=world.cache, family=world.kind.name,
            resolution=framing.resolution, step=framing.bucket_step,
        )
    )  # fmt: skip
    return path


class Killed(BaseException):
    """Like SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("world", [SDXL], ids=["sdxl"], indirect=True)
def test_a_run_says_its_buckets_and_a_killed_one_ends_the_same(world, written, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    whole = build.run(recipe.load(str(written)), run)
    made = {(found["width"], found["height"]): found["pairs"] for found in whole.result["buckets"]}
    side = world.framing.resolution
    assert set(made) == {(side, side), (side * 5 // 4, side * 3 // 4), (side * 3 // 4, side * 5 // 4)}
    assert sum(made.values()) == whole.result["pairs"]
    assert [found["pairs"] for found in whole.result["buckets"]] == sorted(made.values(), reverse=True)
    said = ", ".join(f"{width}×{height} {count}" for (width, height), count in made.items())
    assert f"buckets: {said}" in capsys.readouterr().err
    assert whole.result["latent_shape"] == [4, side // 4, side // 4]
    assert "3 aspect-ratio buckets" in (run / "README.md").read_text("utf-8")

    loss, calls = PairMethod.loss, []

    def dies(self, part):
        calls.append(len(part))
        if len(calls) == 9:
            raise Killed
        return loss(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(PairMethod, "loss", dies)
        with pytest.raises(Killed):
            build.run(recipe.load(str(written)), tmp_path / "cut", quiet=True)
    assert json.loads((tmp_path / "cut/metrics.jsonl").read_text().splitlines()[-1])["step"] < 5
    build.run(recipe.load(str(written)), tmp_path / "cut", quiet=True)
    one, two = (load_file(d / "adapter/pytorch_lora_weights.safetensors") for d in (run, tmp_path / "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("world", [SDXL], ids=["sdxl"], indirect=True)
def test_every_key_of_the_recipe_reaches_the_framing(written):
    given = {
        "data.resolution": ("128", {"resolution": 128}),
        "data.bucket_step_pixels": ("8", {"bucket_step": 8}),
        "data.max_aspect": ("3", {"max_aspect": 3.0}),
        "data.crop": ("top", {"crop": "top"}),
        "data.small_images": ("drop", {"small_images": "drop"}),
    }
    plain = parts.framing(recipe.load(str(written)))
    for key, (value, change) in given.items():
        assert parts.framing(recipe.load(str(written), [f"{key}={value}"])) == replace(plain, **change)
    squares = ["data.aspect=square", "data.bucket_step_pixels=64"]
    assert parts.framing(recipe.load(str(written), squares)) == Framing(plain.resolution)
