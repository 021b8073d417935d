"""Reference errors on disk: what is not sound is unknown, and whoever has them learns the same, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lora_dpo import parts, recipe
from lora_dpo.errors import UserError
from lora_dpo.methods.objectives import Dpo, Kto, Objective, PairErrors, Sft
from lora_dpo.methods.pairs import PairMethod, can_be_stored, reference_composition
from lora_dpo.methods.stream import PairStream
from lora_dpo.reference_cache import ReferenceErrors
from tests.support.toy import Run, ToyPairs
from tests.support.training import World, attach, make_world, stream
from tests.test_train import timeless

KEYS = [f"{n:032x}" for n in range(1000)]
SIZE = 16


def store(directory: Path, **identity) -> ReferenceErrors:
    return ReferenceErrors(directory, identity, KEYS)


def test_what_was_written_is_read(tmp_path):
    one = store(tmp_path)
    places = [(3, 0), (999, 2), (0, 0)]
    assert one.read(places).isnan().all()
    errors = torch.rand(3, 2)
    one.write(places, errors)
    assert torch.equal(one.read(places), errors)
    # By another process, in another order, among unknown ones.
    found = store(tmp_path).read([(0, 0), (1, 0), (3, 2), (999, 2)])
    assert torch.equal(found[[0, 3]], errors[[2, 1]])
    assert found[1:3].isnan().all()
    assert one.read([]).shape == (0, 2)
    # Another identity has errors of its own.
    assert store(tmp_path, seed=1).read(places).isnan().all()
    assert len(list(tmp_path.glob("references-*"))) == 2


def test_a_side_may_be_unknown(tmp_path):
    one = store(tmp_path)
    one.write([(5, 1)], torch.tensor([[0.5, float("nan")]]))
    found = one.read([(5, 1)])
    assert found[0, 0] == 0.5
    assert found[0, 1].isnan()


def test_reserved_space_is_not_used(tmp_path):
    one = store(tmp_path)
    one.write([(700, 0)], torch.ones(1, 2))
    file = one.path / "visit-00000.bin"
    assert file.stat().st_size == len(KEYS) * SIZE
    assert file.read_bytes().count(0) > len(KEYS) * SIZE - SIZE


@pytest.mark.parametrize("damage", ["zeros", "half", "bit", "cut", "moved"])
def test_a_damaged_record_is_unknown_and_written_again(tmp_path, damage):
    one = store(tmp_path)
    places = [(4, 0), (5, 0)]
    one.write(places, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    file = one.path / "visit-00000.bin"
    data = bytearray(file.read_bytes())
    if damage == "zeros":
        data[5 * SIZE : 6 * SIZE] = bytes(SIZE)
    elif damage == "half":
        data[5 * SIZE + 4 : 6 * SIZE] = bytes(SIZE - 4)
    elif damage == "bit":
        data[5 * SIZE + 2] ^= 1
    elif damage == "cut":
        data = data[: 5 * SIZE + 7]
    else:
        data[5 * SIZE : 6 * SIZE] = data[4 * SIZE : 5 * SIZE]
    file.write_bytes(data)
    again = store(tmp_path)
    found = again.read(places)
    assert torch.equal(found[0], torch.tensor([0.1, 0.2]))
    assert found[1].isnan().all()
    again.write([(5, 0)], torch.tensor([[0.5, 0.6]]))
    assert torch.equal(store(tmp_path).read([(5, 0)]), torch.tensor([[0.5, 0.6]]))


def values(index: int, visit: int) -> list[float]:
    drawn = random.Random(1000 * visit + index)
    return torch.tensor([drawn.random(), drawn.random()], dtype=torch.float32).tolist()


def fill_forever(directory: Path, seed: int) -> None:
    one, drawn = store(directory), random.Random(seed)
    while True:
        place = (drawn.randrange(1000), drawn.randrange(2))
        one.write([place], torch.tensor([values(*place)]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_killed_processes_leave_what_is_true(tmp_path):
    """Two fill the same files and are killed at once; every record is right or unknown."""
    processes = [
        multiprocessing.get_context("fork").Process(target=fill_forever, args=(tmp_path, seed)) for seed in (1, 2)
    ]
    for process in processes:
        process.start()
    time.sleep(0.5)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    places = [(index, visit) for index in range(1000) for visit in range(2)]
    found = store(tmp_path).read(places)
    known = ~found.isnan().any(dim=1)
    assert known.sum() > 20
    assert torch.equal(found[known], torch.tensor([values(*place) for place in places])[known])


def test_a_folder_that_cannot_be_written_serves_what_it_has(tmp_path, monkeypatch):
    store(tmp_path).write([(1, 0)], torch.ones(1, 2))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    one = store(tmp_path)
    assert not one.can_write
    one.write([(2, 0)], torch.ones(1, 2))
    found = one.read([(1, 0), (2, 0), (1, 7)])
    assert torch.equal(found[0], torch.ones(2))
    assert found[1:].isnan().all()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    one = store(tmp_path)

    @contextlib.contextmanager
    def full(_visit):
        with (tmp_path / "full").open("wb", 0) as file:
            file.seek = lambda _: None
            file.write = no_space
            yield file

    def no_space(_data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(one, "_opened", full)
    with pytest.raises(UserError, match="no space left"):
        one.write([(0, 0)], torch.ones(1, 2))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


def run(directory: Path, references: ReferenceErrors | None, *, beta=200.0, pair_pass="plain", **options) -> Run:
    """7 pairs in steps of 4, two draws each: from step 4 on, draws come again."""
    made = Run(directory, dropout=0.1)
    drawn = PairStream(ToyPairs(7), made.family, seed=0, batch_pairs=4, visits_per_pair=2)
    made.method = PairMethod(drawn, made.family, made.adapters, Dpo(beta), pair_pass=pair_pass, references=references)
    made.passes = 0  # pyright: ignore
    inner = made.adapters.reference

    def counted():
        made.passes += 1  # pyright: ignore
        return inner()

    made.adapters.reference = counted
    made.train(**options)
    return made


def of_toy(directory: Path) -> ReferenceErrors:
    return ReferenceErrors(directory, {}, [f"pair-{index}" for index in range(7)])


def without_passes(lines):
    return [{name: value for name, value in line.items() if name != "reference_passes"} for line in lines]


@pytest.mark.parametrize("way", ["plain", "split"])
def test_with_and_without_is_the_same_to_the_bit(tmp_path, way):
    micro = 1 if way == "plain" else 4
    cache = tmp_path / "cache"
    plain = run(tmp_path / "plain", None, pair_pass=way, micro_batch_pairs=micro)
    first = run(tmp_path / "first", of_toy(cache), pair_pass=way, micro_batch_pairs=micro)
    lines = timeless(tmp_path / "first")
    assert without_passes(lines) == timeless(tmp_path / "plain")
    ours, theirs = plain.adapters.state_dict(), first.adapters.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # 14 draws are new; of the last 10, some were met before.
    computed = [round(4 * line["reference_passes"]) for line in lines]
    assert sum(computed) == 14
    assert computed[:3] == [4, 4, 4]
    assert computed[4:] == [0, 0]
    assert first.passes == 14 * (1 if way == "plain" else 2)
    # Another run of them, with another β, and one that is resumed: the reference never runs.
    other = run(tmp_path / "other", of_toy(cache), beta=50.0, pair_pass=way, micro_batch_pairs=micro)
    assert other.passes == 0
    assert {line["reference_passes"] for line in timeless(tmp_path / "other")} == {0.0}
    run(tmp_path / "parts", of_toy(cache), steps=3, pair_pass=way, micro_batch_pairs=micro)
    resumed = run(tmp_path / "parts", of_toy(cache), pair_pass=way, micro_batch_pairs=micro)
    assert resumed.passes == 0
    theirs = resumed.adapters.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_in_larger_parts_it_is_the_same_to_rounding(tmp_path):
    run(tmp_path / "plain", None, micro_batch_pairs=4)
    run(tmp_path / "cached", of_toy(tmp_path / "cache"), micro_batch_pairs=4)
    for line, other in zip(timeless(tmp_path / "cached"), timeless(tmp_path / "plain"), strict=True):
        # Where policy and reference are the same, rounding of different batches decides who seems better.
        for name, value in other.items() if line["step"] > 1 else ():
            assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_an_unfinished_cache_is_filled_in_the_same_step(tmp_path):
    """Hits and misses of one part mix; what is missing alone is computed."""
    whole = run(tmp_path / "whole", of_toy(tmp_path / "cache"), micro_batch_pairs=4, steps=1)
    assert whole.passes == 4
    (file,) = (tmp_path / "cache").glob("references-*/visit-00000.bin")
    data = file.read_bytes()
    used = [place for place in range(7) if any(data[place * SIZE : (place + 1) * SIZE])]
    assert len(used) == 4
    file.write_bytes(data[: used[2] * SIZE] + bytes(len(data) - used[2] * SIZE))
    mixed = run(tmp_path / "mixed", of_toy(tmp_path / "cache"), micro_batch_pairs=4, steps=1)
    assert mixed.passes == 2
    assert without_passes(timeless(tmp_path / "mixed")) == without_passes(timeless(tmp_path / "whole"))
    assert [line["reference_passes"] for line in timeless(tmp_path / "mixed")] == [0.5]
    assert file.read_bytes() == data


def test_an_error_that_is_not_finite_is_not_kept(tmp_path):
    references = of_toy(tmp_path)
    made = Run(tmp_path / "run")
    with torch.no_grad():
        made.family.denoiser[1].base_layer.bias.fill_(float("inf"))
    drawn = PairStream(ToyPairs(7), made.family, seed=0, batch_pairs=4)
    method = PairMethod(drawn, made.family, made.adapters, Dpo(1.0), references=references)
    part = next(next(method.batches(0)).parts())
    method.loss(part)
    assert references.read(list(zip(part.indices, part.visits, strict=True))).isnan().all()


@dataclass(frozen=True)
class Anchored(Objective):
    """Of winners alone, as SFT held near the reference."""

    needs = frozenset({"reference"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return (errors.winner - errors.ref_winner).square()


@dataclass(frozen=True)
class Shifted(Objective):
    needs = frozenset({"reference", "shift"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return errors.shift_winner


@pytest.mark.parametrize(
    ("objective", "way", "composition"),
    [(Dpo(1.0), "plain", "pair"), (Dpo(1.0), "split", "image"), (Anchored(), "plain", "image")],
)
def test_a_stored_error_is_that_of_one_pairs_pass(world, tmp_path, objective, way, composition):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=0.1)
    drawn = stream(pairs, family, batch_pairs=3)
    assert reference_composition(objective, way) == composition
    references = ReferenceErrors(tmp_path, {}, pairs.keys)
    batch = drawn.batch(0)
    cached, plain = (
        PairMethod(drawn, family, adapters, objective, pair_pass=way, references=store) for store in (references, None)
    )
    whole = cached.backward(next(batch.parts(3)))
    again = cached.backward(next(batch.parts(3)))
    alone = [plain.backward(part) for part in batch.parts(1)]
    assert whole.sums["reference_passes"] == 3
    assert again.sums["reference_passes"] == 0
    for name in ("ref_error_winner", "ref_error_loser"):
        if name in whole.sums:
            assert torch.equal(again.sums[name], whole.sums[name])
            torch.testing.assert_close(whole.sums[name], sum(one.sums[name] for one in alone))
    known = references.read(list(zip(batch.indices, batch.visits, strict=True)))
    assert torch.equal(known[:, 0], torch.stack([one.sums["ref_error_winner"] for one in alone]))
    assert known[:, 1].isnan().all() == (objective == Anchored())


def test_predictions_are_not_stored():
    assert can_be_stored(Dpo(1.0))
    assert can_be_stored(Kto(1.0))
    assert not can_be_stored(Sft())
    assert not can_be_stored(Shifted())


RECIPE = """
[data]
path = "{world.data}"
resolution = 64
[base]
family = "sdxl"
model = "{world.base}"
[method]
kind = "dpo"
beta = 500
visits_per_pair = 4
reference_cache = true
[train]
batch_pairs = 3
device = "cpu"
[output]
cache_dir = "{world.cache}"
"""


def test_the_recipe_chooses(world, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.format(world=world))

    def passes(*changes: str) -> float:
        loaded = recipe.load(str(file), list(changes))
        family = world.family()
        method = parts.method(loaded, world.pairs(family), family, attach(family))
        found = method.loss(next(next(method.batches(0)).parts()))
        return found.sums.get("reference_passes", torch.tensor(-1.0)).item()

    assert passes("method.reference_cache=false") == -1
    assert passes() == 3
    for same in ("method.beta=1000", "method.visits_per_pair=2", "method.kind=ipo", "train.batch_pairs=2"):
        assert passes(same) == 0, same
    for other in (
        "method.kind=kto", "train.seed=1", "base.dtype=bfloat16", "train.precision=bfloat16", "train.pair_pass=split",
        "data.caption_dropout=0.1", "method.timestep_range=[0, 500]", "method.timestep_sampling=stratified",
    ):  # fmt: skip
        assert passes(other) == 3, other
        assert passes(other) == 0, other


def test_another_adapter_as_the_reference_has_other_errors(world, tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE.format(world=world))
    loaded = recipe.load(str(tmp_path / "small.toml"))
    family = world.family()
    drawn = stream(world.pairs(family), family)

    def of(**options) -> str:
        adapters = attach(family, **options)
        if options:
            adapters.keep_as_reference()
        found = parts.reference_identity(loaded, drawn, adapters, "pair")["reference"]
        with torch.no_grad():
            next(iter(adapters.parameters().values())).add_(1)  # the policy is trained, the reference stays
        assert parts.reference_identity(loaded, drawn, adapters, "pair")["reference"] == found
        adapters.detach()
        return found

    assert of() == "base"
    assert of(moved=0.1) == of(moved=0.1) != of(moved=0.2)
    assert of(moved=0.1, alpha=8.0) != of(moved=0.1)


def test_a_recipe_without_a_bound_is_refused(world, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.format(world=world).replace("visits_per_pair = 4\n", ""))
    with pytest.raises(UserError, match=r"method\.reference_cache.*give method\.visits_per_pair = 4"):
        recipe.load(str(file))
    with pytest.raises(UserError, match=r"method\.reference_cache"):
        recipe.load(str(file), ["method.kind=sft", "method.reference_cache=true"])
