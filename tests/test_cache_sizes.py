"""The cache of pictures of several sizes: each encoded as it would be fresh, once per size, and found again."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora_dpo import cache, cache_fill, cache_use
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.cache_store import digest
from lora_dpo.data.framing import Framing, frame
from lora_dpo.data.images import decode, to_pixels
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import UserError
from lora_dpo.families.sdxl import SDXL
from tests.support.models import save_random_pairs
from tests.support.training import BUCKETS, PAIRS, SHAPES, SHARED, SQUARE, TALL, WIDE, World, make_mixed_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_mixed_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pairs(world) -> CachedPairs:
    return world.pairs(world.family())


class Watched:
    """A family and a source that count what is encoded and decoded."""

    def __init__(self, world: World, monkeypatch, data=None) -> None:
        self.family, self.source = world.family(), PickAPicParquet(data or world.data)
        self.encoded: list[tuple[int, ...]] = []
        self.decoded = 0
        encode = self.family.encode_images
        monkeypatch.setattr(
            self.family, "encode_images", lambda x: self.encoded.extend([tuple(x.shape[2:])] * len(x)) or encode(x)
        )

        def decoding(data, where):
            self.decoded += 1
            return decode(data, where)

        for module in ("lora_dpo.cache_fill", "lora_dpo.data.screening"):
            monkeypatch.setattr(f"{module}.decode", decoding)


def moments_of(pairs: CachedPairs, index: int):
    pair = pairs.pair(index)
    return [(pair.winner, pair.winner_geometry), (pair.loser, pair.loser_geometry)]


def same(one: CachedPairs, other: CachedPairs) -> bool:
    return one.keys == other.keys and all(
        torch.equal(mine, theirs)
        for index in range(len(one))
        for first, second in zip(moments_of(one, index), moments_of(other, index), strict=True)
        for mine, theirs in zip((*first[0], first[1]), (*second[0], second[1]), strict=True)
    )


def test_a_pair_shares_its_bucket_and_each_picture_has_its_own_geometry(world, pairs):
    family, preferences = world.family(), list(PickAPicParquet(world.data))
    assert len(pairs) == len(preferences) == PAIRS
    for index, preference in enumerate(preferences):
        assert pairs.size(index) == SHARED[index % len(SHARED)]
        for (moments, geometry), data in zip(
            moments_of(pairs, index), (preference.winner, preference.loser), strict=True
        ):
            picture = decode(data, "here")
            framed, crop = frame(picture, pairs.size(index), "center")
            fresh = family.encode_images(to_pixels(framed)[None])
            torch.testing.assert_close(moments.mean, fresh.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(moments.std, fresh.std, rtol=1e-5, atol=1e-6)
            assert geometry.tolist() == [[picture.height, picture.width, *crop, *pairs.size(index)]]
    originals = {tuple(g[0, :2].tolist()) for _, g in moments_of(pairs, 1)}
    assert originals == set(SHAPES[1])
    assert pairs.sizes() == Counter({SQUARE: 4, WIDE: 2, TALL: 4})


def test_a_shard_holds_one_size(world, pairs):
    shapes = {}
    for path in world.cache.glob("moments-*/*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes.setdefault(path.parent, set()).add(tuple(file.get_slice("mean").get_shape()[2:]))
    assert sorted(map(list, shapes.values())) == [[(6, 10)], [(8, 8)], [(10, 6)]]
    for folder, (shape,) in shapes.items():
        about = json.loads((folder / "about.json").read_text())
        assert (about["size"], about["crop"]) == ([4 * side for side in shape], "center")


def test_every_size_is_known_to_be_in_use(world, pairs):
    """So that a pruning leaves alone what a fill of these pairs may have written."""
    (index,) = world.cache.glob("pairs-*.safetensors")
    note = cache_use.note(index)
    folders = {path.name for pattern in ("moments-*", "prompts-*") for path in world.cache.glob(pattern)}
    assert note is not None
    assert len(note.groups) == 4
    assert set(note.groups) == folders
    assert cache_use.in_use(index)


def test_a_second_fill_encodes_nothing_and_decodes_nothing(world, pairs, monkeypatch):
    watched = Watched(world, monkeypatch)
    assert same(fill(watched.source, watched.family, world.cache, BUCKETS), pairs)
    for index in world.cache.glob("pairs-*.safetensors"):
        index.unlink()
    assert same(fill(watched.source, watched.family, world.cache, BUCKETS), pairs)
    assert (watched.encoded, watched.decoded) == ([], 0)


def test_squares_in_buckets_are_those_of_a_square_cache(world, tmp_path, monkeypatch):
    family = world.family()
    squares = fill(PickAPicParquet(world.data), family, tmp_path, 32)
    # The name that the squares of earlier versions have.
    name = digest(2, family.fingerprint()["vae"], 32)
    assert cache.VERSION == 2
    assert [path.name for path in tmp_path.glob("moments-*")] == [f"moments-{name}"]
    watched = Watched(world, monkeypatch)
    mixed = fill(watched.source, watched.family, tmp_path, BUCKETS)
    assert Counter(watched.encoded) == {WIDE: 4, TALL: 8}
    assert mixed.keys == squares.keys
    assert mixed.fingerprint != squares.fingerprint
    alike = [index for index in range(PAIRS) if mixed.size(index) == SQUARE]
    assert len(alike) == 4
    for index in alike:
        assert torch.equal(mixed.pair(index).winner.mean, squares.pair(index).winner.mean)


def test_a_picture_in_two_buckets_is_stored_in_both(world, tmp_path, monkeypatch):
    """Square beside a square, and beside a very tall one; in the first bucket twice."""
    rows = pq.read_table(world.data).to_pylist()
    square = rows[0]["jpg_0"]
    made = [
        rows[0] | {"caption": "one"},
        rows[3] | {"jpg_0": square, "caption": "two"},
        rows[0] | {"caption": "three", "jpg_1": square, "jpg_0": rows[0]["jpg_1"]},
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "shared.parquet")
    watched = Watched(world, monkeypatch, tmp_path / "shared.parquet")
    pairs = fill(watched.source, watched.family, tmp_path / "cache", BUCKETS)
    assert [pairs.size(index) for index in range(3)] == [SQUARE, TALL, SQUARE]
    assert Counter(watched.encoded) == {SQUARE: 2, TALL: 2}
    for index, (height, width) in enumerate([SQUARE, TALL, SQUARE]):
        for moments, geometry in moments_of(pairs, index):
            assert moments.mean.shape[2:] == (height // 4, width // 4)
            assert geometry[0, 4:].tolist() == [height, width]


@pytest.mark.parametrize(
    ("changes", "encoded"),
    [
        ({"crop": "top"}, {SQUARE: 8, WIDE: 4, TALL: 8}),
        ({"max_aspect": 1.3}, {SQUARE: 12}),  # no bucket is left but the square
        ({"small_images": "drop"}, {}),
    ],
)
def test_another_plan_encodes_what_it_has_not_got(world, pairs, tmp_path, monkeypatch, changes, encoded):
    shutil.copytree(world.cache, tmp_path / "cache")
    watched = Watched(world, monkeypatch)
    other = fill(watched.source, watched.family, tmp_path / "cache", replace(BUCKETS, **changes))
    assert other.fingerprint != pairs.fingerprint
    assert other.keys == pairs.keys
    assert Counter(watched.encoded) == encoded


def test_the_top_of_tall_pictures(world, tmp_path):
    """A head in a tall portrait is kept by "top" and cut by "center"."""

    def portrait() -> bytes:
        image = Image.new("RGB", (32, 96), "blue")
        image.paste("red", (0, 0, 32, 16))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    (row,) = pq.read_table(save_random_pairs(tmp_path / "p.parquet", 1)).to_pylist()
    pq.write_table(
        pa.Table.from_pylist([row | {"jpg_0": portrait(), "label_0": 1.0, "label_1": 0.0}]), tmp_path / "p.parquet"
    )
    family = SDXL(world.base)
    red, blue = (torch.tensor(c)[None, :, None, None].expand(1, 3, 32, 32).float() for c in ((1, 0, 0), (0, 0, 1)))
    upper = torch.cat([red[:, :, :16], blue[:, :, 16:]], dim=2)
    for crop, pixels, top in (("center", blue, 32), ("top", upper, 0)):
        pair = fill(PickAPicParquet(tmp_path / "p.parquet"), family, tmp_path / crop, Framing(32, crop=crop)).pair(0)
        assert pair.winner_geometry.tolist() == [[96, 32, top, 0, 32, 32]]
        torch.testing.assert_close(pair.winner.mean, family.encode_images(pixels).mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aspect", ["square", "buckets"])
def test_pairs_of_small_pictures_are_dropped_and_counted(world, tmp_path, aspect):
    shapes = [((32, 32), (32, 32)), ((32, 31), (90, 90)), ((200, 100), (300, 150)), ((20, 60), (300, 600))]
    data = save_random_pairs(tmp_path / "p.parquet", 8, shapes=shapes)
    framing = replace(BUCKETS, aspect=aspect, small_images="drop")
    pairs = fill(PickAPicParquet(data), world.family(), tmp_path / "cache", framing)
    wide = "40×24" if aspect == "buckets" else "32×32"
    assert (len(pairs), pairs.report.rows, pairs.report.kept) == (4, 8, 4)
    assert pairs.report.dropped == {"picture too small": 4}
    examples = pairs.report.examples["picture too small"]
    assert [example.split(": ")[0] for example in examples] == [f"p.parquet:{row}" for row in (1, 3, 5, 7)]
    assert "31×32" in examples[0]
    assert examples[0].endswith("for 32×32")
    assert "60×20" in examples[1]
    assert examples[1].endswith(f"for {wide}")
    assert (
        len(fill(PickAPicParquet(data), world.family(), tmp_path / "cache", replace(framing, small_images="enlarge")))
        == 8
    )
    with pytest.raises(UserError, match="no usable pair") as caught:
        fill(PickAPicParquet(data), world.family(), tmp_path / "cache", replace(framing, resolution=512))
    assert "8 picture too small" in str(caught.value)


class Killed(BaseException):
    """Like a KeyboardInterrupt: nothing may catch it."""


OPTIONS = {"images_per_batch": 2, "bytes_per_shard": 10000}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The pairs in small shards, and the cache's folder."""
    folder = tmp_path_factory.mktemp("whole")
    return fill(PickAPicParquet(world.data), world.family(), folder, BUCKETS, **OPTIONS), folder


@pytest.mark.parametrize("after", [1, 6])
def test_a_killed_fill_goes_on_and_ends_the_same(world, whole, tmp_path, monkeypatch, after):
    watched = Watched(world, monkeypatch)
    encode, calls = watched.family.encode_images, []

    def dies(pixels):
        calls.append(len(pixels))
        if len(calls) > after:
            raise Killed
        return encode(pixels)

    monkeypatch.setattr(watched.family, "encode_images", dies)
    with pytest.raises(Killed):
        fill(watched.source, watched.family, tmp_path / "cut", BUCKETS, **OPTIONS)
    kept = sum(len(open_keys(path)) for path in (tmp_path / "cut").glob("moments-*/*.safetensors"))
    again = Watched(world, monkeypatch)
    resumed = fill(again.source, again.family, tmp_path / "cut", BUCKETS, **OPTIONS)
    assert len(again.encoded) == 2 * PAIRS - kept
    assert same(resumed, whole[0])
    files = [sorted(p.relative_to(d).as_posix() for p in d.glob("moments-*/*")) for d in (whole[1], tmp_path / "cut")]
    assert files[0] == files[1]


def open_keys(path) -> list[str]:
    with safe_open(path, "pt") as file:
        return file.metadata()["keys"].split()


def test_chunks_of_another_process_are_left_to_it(world, whole, tmp_path, monkeypatch):
    """It encodes the pictures of all sizes in its chunk meanwhile."""
    other, folder = whole
    watched, told = Watched(world, monkeypatch), []
    try_, refused = cache_fill._try, []

    def busy(lock, *args, **kwargs):
        """The second chunk is the other's until it is waited for; then its shards are there."""
        if lock.lock_file.endswith("/1.lock"):
            if not refused:
                refused.append(lock.lock_file)
                return False
            for path in folder.glob("moments-*/*"):
                target = tmp_path / "mine" / path.relative_to(folder)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        return try_(lock, *args, **kwargs)

    monkeypatch.setattr(cache_fill, "_try", busy)
    mine = fill(watched.source, watched.family, tmp_path / "mine", BUCKETS, tell=told.append, **OPTIONS)
    assert told == ["another process is filling this cache: waiting for 1 of its shards"]
    assert 0 < len(watched.encoded) < 2 * PAIRS
    assert same(mine, other)


def test_a_damaged_shard_of_one_size_is_mended_and_the_others_are_left(world, tmp_path, monkeypatch):
    first = fill(PickAPicParquet(world.data), world.family(), tmp_path, BUCKETS)
    before = {path: path.read_bytes() for path in tmp_path.glob("moments-*/*.safetensors")}
    (broken,) = [path for path in before if json.loads((path.parent / "about.json").read_text())["size"] == list(TALL)]
    broken.write_bytes(before[broken][:-9])
    watched, told = Watched(world, monkeypatch), []
    assert same(fill(watched.source, watched.family, tmp_path, BUCKETS, tell=told.append), first)
    assert set(watched.encoded) == {TALL}
    assert len(told) == 1
    assert {path: path.read_bytes() for path in tmp_path.glob("moments-*/*.safetensors")} == before


def test_a_step_that_the_model_cannot_halve_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="steps of 8 pixels, got 4") as caught:
        fill(PickAPicParquet(world.data), world.family(), tmp_path, replace(BUCKETS, bucket_step=4))
    assert "data.bucket_step_pixels" in str(caught.value)
