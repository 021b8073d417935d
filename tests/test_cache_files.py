"""Several processes with one cache: they divide its filling, and pruning takes nothing that one of them needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_dpo import cache_files, cache_index, cache_use
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.cache_store import Store
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import UserError
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.reference_cache import ReferenceErrors
from tests.support.filling import filled, pruned
from tests.support.models import save_random_pairs, save_random_sd
from tests.support.processes import ROOT, environment


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 12, size=40)
    save_random_pairs(folder / "more.parquet", 4, size=40, seed=7)
    return folder


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A cache that nothing happened to."""
    filled(world, world / "whole").close()
    return world / "whole"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def more(world: Path, cache: Path) -> CachedPairs:
    """Other pairs in the same groups."""
    return fill(PickAPicParquet(world / "more.parquet"), StableDiffusion(world / "base"), cache, 32)


def content(directory: Path) -> dict[str, bytes]:
    """Of all shards."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.glob("*-*/*.safetensors"))
    }


def indexes(directory: Path) -> set[Path]:
    return set(directory.glob("pairs-*.safetensors"))


def plan(directory: Path, own=(), stays=lambda _: True) -> cache_files.Pruning:
    return cache_files.to_prune(cache_files.survey(directory, own), stays)


def reasons(found: cache_files.Pruning) -> dict[str, int]:
    return {reason: files for reason, (files, _) in found.reasons().items()}


class Killed(BaseException):
    """Like SIGKILL: nothing may catch it."""


def interrupted(world: Path, cache: Path, monkeypatch, pictures: int) -> None:
    """A fill that dies after so many pictures."""
    encode, done = StableDiffusion.encode_images, []

    def dies(self, pixels):
        if len(done) == pictures:
            raise Killed
        done.append(len(pixels))
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_images", dies)
        with pytest.raises(Killed):
            filled(world, cache)


def test_two_processes_divide_a_fill_while_a_third_one_prunes(world: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("base", "pairs.parquet"):
        (tmp_path / name).symlink_to(world / name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.filling", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    pictures = [one["pictures"] for one in told if "pictures" in one]
    assert sum(pictures) == 24
    assert min(pictures) >= 4
    [pruner] = [one for one in told if "rounds" in one]
    assert pruner["rounds"] > 3
    assert content(tmp_path / "cache") == content(whole)
    pairs = filled(tmp_path, tmp_path / "cache")
    assert pairs.encoded.total() == 0


def test_nothing_is_pruned_of_a_cache_in_order(cache: Path) -> None:
    before = content(cache)
    assert plan(cache).files == {}
    assert plan(cache).kept_bytes == 0
    assert content(cache) == before


def test_shards_that_no_pairs_are_made_of_go(world: Path, cache: Path) -> None:
    before = content(cache)
    mine = indexes(cache)
    more(world, cache).close()
    (index,) = indexes(cache) - mine
    added = {cache / name for name in content(cache).keys() - before.keys()}
    assert plan(cache).files == {}
    for path in (index, index.with_suffix(".lock")):
        path.unlink()
    found = plan(cache)
    assert set(found.files) == added
    assert reasons(found) == {"shards that no pairs are made of": len(added)}
    freed, failed = cache_files.delete(cache, {path: size for path, (size, _) in found.files.items()})
    assert freed == sum(size for size, _ in found.files.values()) > 0
    assert failed == []
    assert content(cache) == before


def test_other_pairs_go_with_what_is_theirs_alone(world: Path, cache: Path) -> None:
    before = content(cache)
    own = sorted(indexes(cache))
    more(world, cache).close()
    added = {cache / name for name in content(cache).keys() - before.keys()}
    everything = plan(cache, own, lambda _: False)
    assert {path for path in everything.files if path.suffix != ".lock"} == added | (indexes(cache) - {*own})
    assert reasons(everything)["other pairs"] == 2  # the index and its lock
    cache_files.delete(cache, {path: size for path, (size, _) in everything.files.items()})
    assert content(cache) == before
    # What both use stays with either.
    assert not plan(cache, own, lambda _: False).files
    cache_files.delete(cache, {path: size for path, (size, _) in plan(cache, [], lambda _: False).files.items()})
    assert [path.name for path in cache.iterdir()] == ["prune.lock"]


def test_reference_errors_go_with_their_pairs(world: Path, cache: Path) -> None:
    pairs, others = filled(world, cache), more(world, cache)
    kept = ReferenceErrors(cache, {"pairs": pairs.fingerprint}, pairs.keys)
    gone = ReferenceErrors(cache, {"pairs": others.fingerprint}, others.keys)
    for references in (kept, gone):
        references.write([(0, 0), (1, 3)], torch.ones(2, 2))
    pairs.close()
    others.close()
    assert reasons(plan(cache)) == {}
    (own,) = [path for path in indexes(cache) if cache_index.read(path).fingerprint == pairs.fingerprint]
    chosen = plan(cache, [own], lambda _: False)
    assert chosen.reasons()["reference errors of pairs that are gone"][0] == 2
    cache_files.delete(cache, {path: size for path, (size, _) in chosen.files.items()})
    assert kept.path.exists()
    assert not gone.path.exists()
    assert not kept.read([(1, 3)]).isnan().any()
    # While it can't be told which pairs there are, all errors stay.
    own.write_bytes(b"")
    assert "reference errors of pairs that are gone" not in reasons(plan(cache))


def test_what_a_process_uses_stays(world: Path, cache: Path) -> None:
    pairs = more(world, cache)
    before = content(cache)
    found = plan(cache, [], lambda _: False)
    assert "other pairs" in reasons(found)  # of `cache`, which nobody uses
    pruned(cache)
    assert content(cache).keys() <= before.keys()
    assert len(indexes(cache)) == 1
    assert torch.isfinite(pairs.pair(0).winner.mean).all()
    pairs.close()
    pruned(cache)
    assert content(cache) == {}


def test_an_interrupted_fill_finds_its_shards_after_a_pruning(world, cache, whole, tmp_path, monkeypatch) -> None:
    interrupted(world, tmp_path / "half", monkeypatch, pictures=9)
    half = tmp_path / "half"
    made = content(half)
    assert len(made) == 9
    assert list(half.glob("locks-*/*.lock"))
    found = plan(half)
    assert reasons(found) == {"rests of processes that ended": len(list(half.glob("locks-*/*")))}
    assert found.kept_bytes == sum(map(len, made.values()))
    cache_files.delete(half, {path: size for path, (size, _) in found.files.items()})
    assert content(half) == made
    assert not list(half.glob("locks-*"))
    pairs = filled(world, half)
    assert pairs.encoded["pictures"] == 24 - 9
    assert content(half) == content(whole)
    # Unless other recipes' part is to go.
    pairs.close()
    shutil.rmtree(half)
    interrupted(world, half, monkeypatch, pictures=9)
    assert {half / name for name in content(half)} < plan(half, [], lambda _: False).files.keys()


@pytest.mark.parametrize("how", ["damaged index", "lost note", "another version's index"])
def test_shards_stay_while_it_cannot_be_told_who_needs_them(cache: Path, monkeypatch, how: str) -> None:
    (index,) = cache.glob("pairs-*.safetensors")
    if how == "another version's index":
        monkeypatch.setattr("lora_dpo.cache_index.FORMAT", "3")
    else:
        index.write_bytes(index.read_bytes()[:-1])
    if how == "lost note":
        index.with_suffix(".lock").write_text("")
    found = plan(cache)
    assert found.files == {}
    assert found.kept_bytes == sum(path.stat().st_size for path in cache.glob("*-*/*.safetensors"))


def test_parts_of_files_go_once_their_process_has_ended(world: Path, cache: Path) -> None:
    (group,) = cache.glob("moments-*")
    (index,) = cache.glob("pairs-*.safetensors")
    parts = [group / ".aa.safetensors.77-ab.partial", cache / f".{index.name}.77-ab.partial"]
    for part in parts:
        part.write_bytes(b"half")
    pairs = filled(world, cache)
    assert plan(cache).files == {}
    pairs.close()
    found = plan(cache)
    assert found.files == {part: (4, "rests of processes that ended") for part in parts}


def test_what_cannot_be_deleted_is_told(cache: Path, monkeypatch) -> None:
    (group,) = cache.glob("prompts-*")
    first = sorted(group.glob("*.safetensors"))[0]
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path == first:
            raise PermissionError
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    files = {path: 1 for path in sorted(cache.rglob("*.safetensors"))}
    freed, failed = cache_files.delete(cache, files)
    assert (freed, failed) == (len(files) - 1, [first])
    assert [path.name for path in cache.glob("*-*/")] == [group.name]


def test_files_of_others_are_never_touched(cache: Path) -> None:
    others = [cache / "mine.safetensors", cache / "moments-mine/x.safetensors", cache / "results/y.safetensors"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    pruned(cache)
    assert all(path.read_bytes() == b"mine" for path in others)
    assert not list(cache.glob("pairs-*"))


def test_a_pruning_keeps_others_out_and_waits_for_none(cache: Path, monkeypatch) -> None:
    told: list[str] = []
    (index,) = cache.glob("pairs-*.safetensors")
    monkeypatch.setattr(cache_use, "PATIENCE_SECONDS", 0.2)
    with cache_use.pruning(cache):
        held = cache_use.hold(index, [], "", told.append)
    assert told == ["another process prunes this cache: waiting until it is done"]
    assert held is not None
    assert cache_use.in_use(index)
    held.close()
    assert not cache_use.in_use(index)
    _acquire = cache_use._acquire
    monkeypatch.setattr(cache_use, "_acquire", lambda *a, **k: _acquire(*a, **k | {"patience": 0.0}))
    with cache_use.pruning(cache), pytest.raises(UserError, match="another process prunes"), cache_use.pruning(cache):
        pass


def test_without_locks_nothing_is_pruned(cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache_use, "try_lock", lambda *_, **__: cache_use.Answer.UNSUPPORTED)
    with pytest.raises(UserError, match="no locks"), cache_use.pruning(cache):
        pass


def test_last_use_is_when_the_pairs_were_opened_or_let_go(world: Path, cache: Path) -> None:
    (index,) = cache.glob("pairs-*.safetensors")
    for path in (index, index.with_suffix(".lock")):
        os.utime(path, (1e9, 1e9))
    assert cache_use.last_use(index) == 1e9
    pairs = filled(world, cache)
    opened = cache_use.last_use(index)
    assert opened is not None
    assert opened > 1.5e9
    os.utime(index.with_suffix(".lock"), (1e9, 1e9))
    pairs.close()
    assert (cache_use.last_use(index) or 0) > 1.5e9
    index.with_suffix(".lock").unlink()
    assert cache_use.last_use(index) == 1e9


def test_a_directory_that_cannot_be_written_needs_no_lock(world: Path, cache: Path, monkeypatch) -> None:
    for lock in cache.glob("*.lock"):
        lock.unlink()
    real = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT and str(path).startswith(str(cache)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    pairs = filled(world, cache)
    assert len(pairs) == 12
    assert not list(cache.glob("*.lock"))


def test_verify_finds_every_damaged_shard(cache: Path) -> None:
    shards = sorted(path.relative_to(cache).as_posix() for path in cache.glob("*-*/*.safetensors"))
    assert cache_files.verify(cache, shards) == []
    flipped, cut, gone = shards[0], shards[5], shards[-1]
    data = bytearray((cache / flipped).read_bytes())
    data[-9] ^= 1
    (cache / flipped).write_bytes(data)
    (cache / cut).write_bytes((cache / cut).read_bytes()[:-1])
    (cache / gone).unlink()
    seen = []
    found = cache_files.verify(cache, shards, lambda *what: seen.append(what))
    assert {damage.path.relative_to(cache).as_posix() for damage in found} == {flipped, cut, gone}
    assert seen[-1] == (len(shards), len(shards), "verifying")


def test_the_survey_counts_what_is_there(world: Path, cache: Path) -> None:
    own = sorted(cache.glob("pairs-*.safetensors"))
    more(world, cache).close()
    damaged = Store(cache / f"moments-{'0' * 32}", {"kind": "moments", "size": [8, 8]})
    damaged.add(["k"], {"x": torch.zeros(1, 2)})
    damaged.flush()
    (bad,) = (cache / f"moments-{'0' * 32}").glob("*.safetensors")
    bad.write_bytes(b"damaged")
    found = cache_files.survey(cache, own)
    empty, moments, prompts = found.groups
    assert (empty.rows, empty.about["size"]) == ({f"moments-{'0' * 32}/{bad.name}": None}, [8, 8])
    assert (sum(r or 0 for r in moments.rows.values()), moments.used) == (24 + 8, 24)
    assert prompts.used == len(set(filled(world, cache).prompts)) + 1
    assert sum(moments.sizes.values()) == sum(p.stat().st_size for p in cache.glob(f"{moments.name}/*.safetensors"))
    assert [pairs.own for pairs in found.pairs].count(True) == 1
    assert sorted(len(pairs.index or []) for pairs in found.pairs) == [4, 12]
