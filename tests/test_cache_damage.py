"""A damaged cache is a miss: whatever happens to its files, what is read is what was encoded."""

from __future__ import annotations

import errno
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lora_dpo import cache_index
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.cache_store import Damaged, Reader, Shard, Store
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families.sdxl import SDXL
from tests.support.models import save_random_pairs, save_random_sdxl


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, pairs, and a cache of them in several shards, not to be changed."""
    root = tmp_path_factory.mktemp("world")
    base, data = save_random_sdxl(root / "sdxl"), save_random_pairs(root / "pairs.parquet", 6, size=40)
    filled(base, data, root / "cache")
    return base, data, root / "cache"


@pytest.fixture
def copied(world, tmp_path):
    base, data, cache = world
    shutil.copytree(cache, tmp_path / "cache")
    return base, data, tmp_path / "cache"


def filled(base, data, cache, told=None, **options) -> CachedPairs:
    tell = None if told is None else told.append
    settings = {"images_per_batch": 2, "bytes_per_shard": 4000, "tell": tell} | options
    return fill(PickAPicParquet(data), SDXL(base), cache, 32, **settings)


def contents(pairs: CachedPairs) -> list[torch.Tensor]:
    """Everything that training reads."""
    found = []
    for index in range(len(pairs)):
        pair = pairs.pair(index)
        found += [*pair.winner, *pair.loser, pair.winner_geometry, pair.loser_geometry]
    return found + list(pairs.conditioning([-1, *range(len(pairs.prompts))]).values())


def same(one: CachedPairs, other: CachedPairs) -> bool:
    pairs = zip(contents(one), contents(other), strict=True)
    return one.fingerprint == other.fingerprint and all(torch.equal(a, b) for a, b in pairs)


def flip(path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped in its header", "deleted", "another's content"])
@pytest.mark.parametrize("kind", ["moments", "prompts"])
def test_a_shard_that_cannot_be_opened_is_encoded_again_and_said_so(world, copied, how, kind):
    base, data, cache = copied
    shards = sorted(cache.glob(f"{kind}-*/*.safetensors"))
    everything = {shard: shard.read_bytes() for shard in sorted(cache.glob("moments-*/*.safetensors"))}
    before = {shard: shard.read_bytes() for shard in shards}
    match how:
        case "cut":
            shards[0].write_bytes(before[shards[0]][:-1])
        case "emptied":
            shards[0].write_bytes(b"")
        case "flipped in its header":
            flip(shards[0], before[shards[0]].index(b'"keys"') + 10)
        case "deleted":
            shards[0].unlink()
        case _:
            shards[0].write_bytes(next(b for p, b in everything.items() if p != shards[0]))
    told = []
    mended = filled(base, data, cache, told)
    assert same(filled(*world), mended)
    assert {shard: shard.read_bytes() for shard in shards} == before
    assert len(told) == (0 if how == "deleted" else 1)
    assert all(shards[0].name in line and "\n" not in line for line in told)


@pytest.mark.parametrize("kind", ["moments", "prompts"])
def test_a_bit_that_flips_while_a_run_reads_is_mended_from_the_source(world, copied, kind):
    base, data, cache = copied
    told = []
    pairs = filled(base, data, cache, told)
    for shard in sorted(cache.glob(f"{kind}-*/*.safetensors")):
        flip(shard, -9)
    assert same(filled(*world), pairs)
    assert told
    assert all("checksum" in line for line in told)


def test_what_cannot_be_mended_stops_and_says_why(copied):
    base, data, cache = copied
    pairs = filled(base, data, cache)
    for shard in cache.glob("moments-*/*.safetensors"):
        flip(shard, -9)
    save_random_pairs(data.parent / "other.parquet", 6, size=40, seed=5)
    pairs._refill = lambda damage: filled(base, data.parent / "other.parquet", cache)
    with pytest.raises(LoraDpoError, match="data has changed"):
        pairs.pair(0)


@examples(max_examples=300)
@given(data=st.data())
def test_any_flipped_bit_of_a_shard_is_found(tmp_path_factory, data):
    """Wherever it is: the shard is refused, or a row is, or nothing that is read has changed."""
    directory = tmp_path_factory.mktemp("shard")
    generator = np.random.default_rng(0)
    rows = {
        "a": torch.from_numpy(generator.normal(size=(3, 2, 5)).astype(np.float32)),
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
    }
    store = Store(directory, {})
    store.add(["00ff", "11ee", "22dd"], rows)
    store.flush()
    (path,) = directory.glob("*.safetensors")
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    try:
        shard = Shard(path)
        read = [shard.row(index) for index in range(3)]
    except Damaged:
        return
    assert shard.keys == ["00ff", "11ee", "22dd"]
    for name, tensor in rows.items():
        assert torch.equal(torch.cat([row[name] for row in read]), tensor)


@examples(max_examples=300)
@given(data=st.data())
def test_any_flipped_bit_of_an_index_is_found(world, tmp_path_factory, data):
    (index,) = world[2].glob("pairs-*.safetensors")
    copy = shutil.copy(index, tmp_path_factory.mktemp("index") / "pairs.safetensors")
    flip(copy, data.draw(st.integers(0, copy.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    read, sound = cache_index.read(copy), cache_index.read(index)
    assert sound is not None
    if read is not None:  # the flip was in what no one reads
        assert list(read.keys) == list(sound.keys)
        assert [read.images(i) for i in range(len(read))] == [sound.images(i) for i in range(len(sound))]
        assert (read.report, read.fingerprint, read.shards) == (sound.report, sound.fingerprint, sound.shards)


def test_a_full_disk_loses_nothing(world, tmp_path, monkeypatch):
    base, data, _ = world
    from lora_dpo import atomic

    write, written = atomic.write, []

    def full(path, content):
        if len(written) == 4:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", full)
        with pytest.raises(UserError, match="no space left on the disk") as caught:
            filled(base, data, tmp_path / "cache")
    assert str(tmp_path) in str(caught.value.where)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert kept
    assert not list(tmp_path.rglob("*.partial"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert same(filled(*world), filled(base, data, tmp_path / "cache"))
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_cache_that_cannot_be_written_serves_what_it_has(world, copied, monkeypatch):
    base, data, cache = copied

    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("lora_dpo.atomic.write", refused)
    assert same(filled(*world), filled(base, data, cache))
    with pytest.raises(UserError, match=r"can't be written \(Permission denied\)") as caught:
        fill(PickAPicParquet(data), SDXL(base), cache, 16)
    assert "cache_dir" in str(caught.value.hint)


def test_a_reader_closes_what_it_opened(world):
    paths = sorted(world[2].glob("moments-*/*.safetensors"))
    reader = Reader(paths)
    row = reader.read(0, 0)["mean"].clone()
    reader.close()
    assert torch.equal(reader.read(0, 0)["mean"], row)
