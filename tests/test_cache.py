"""The cache: what is read equals a fresh encoding, nothing is encoded twice, and a killed fill goes on."""

from __future__ import annotations

import io
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lora_dpo.cache import fill
from lora_dpo.cache_store import OPEN_SHARDS, Reader, Store
from lora_dpo.data import Preference, PreferenceSource, SourceReport
from lora_dpo.data.framing import frame
from lora_dpo.data.images import decode, to_pixels
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import NotFiniteError
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl


@pytest.fixture(scope="module")
def sdxl_path(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("base") / "sdxl")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return save_random_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet", 10, size=40, ties=2)


@pytest.fixture
def counted(sdxl_path, monkeypatch):
    """A family and what it was asked to encode: numbers of images, and prompts."""
    return counting(SDXL(sdxl_path), monkeypatch)


def counting(family, monkeypatch):
    calls = {"images": [], "prompts": []}
    encode_images, encode_prompts = family.encode_images, family.encode_prompts
    monkeypatch.setattr(family, "encode_images", lambda x: calls["images"].append(len(x)) or encode_images(x))
    monkeypatch.setattr(family, "encode_prompts", lambda p: calls["prompts"].extend(p) or encode_prompts(p))
    return family, calls


def edit(path, **changes):
    """A column's first row anew."""
    rows = pq.read_table(path).to_pylist()
    decided = next(row for row in rows if row["label_0"] != 0.5)
    decided.update(changes)
    pq.write_table(pa.Table.from_pylist(rows), path)


def same(one, other):
    assert one.keys == other.keys
    assert one.prompts == other.prompts
    assert one.fingerprint == other.fingerprint
    for index in range(len(one)):
        mine, theirs = one.pair(index), other.pair(index)
        for side in ("winner", "loser"):
            assert torch.equal(getattr(mine, side).mean, getattr(theirs, side).mean)
            assert torch.equal(getattr(mine, side).std, getattr(theirs, side).std)


def test_what_is_read_is_what_would_be_encoded(sdxl_path, pairs, tmp_path):
    family, source = SDXL(sdxl_path), PickAPicParquet(pairs)
    cached = fill(source, family, tmp_path, 32, images_per_batch=1)
    expected = list(source)
    assert len(cached) == len(expected) == 8
    assert cached.report == source.report
    assert cached.report.dropped == {"tie": 2}
    assert cached.origins == [preference.origin for preference in expected]
    for index, preference in enumerate(expected):
        pair = cached.pair(index)
        assert cached.prompts[pair.prompt] == preference.prompt
        assert cached.prompt_index(index) == pair.prompt
        for moments, data in ((pair.winner, preference.winner), (pair.loser, preference.loser)):
            square, _ = frame(decode(data, "here"), (32, 32), "center")
            fresh = family.encode_images(to_pixels(square)[None])
            assert torch.equal(moments.mean, fresh.mean)
            assert torch.equal(moments.std, fresh.std)
    fresh = family.encode_prompts([cached.prompts[1], "", cached.prompts[0]])
    read = cached.conditioning([1, -1, 0])
    assert read.keys() == fresh.keys()
    for name, tensor in fresh.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-5, atol=1e-6)
    assert not read["pooled"][1].any()


def test_stable_diffusion_is_cached_by_the_same_code(pairs, tmp_path):
    family = StableDiffusion(save_random_sd(tmp_path / "sd"))
    cached = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 32)
    assert set(cached.conditioning([0, 1])) == {"prompt_embeds"}
    assert cached.conditioning([0, 1])["prompt_embeds"].shape == (2, 16, 16)
    assert cached.pair(0).winner.mean.shape == (1, 4, 4, 4)


def test_original_sizes_and_crops_are_kept(sdxl_path, tmp_path):
    def wide(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (80, 40), colour).save(buffer, "PNG")
        return buffer.getvalue()

    path = save_random_pairs(tmp_path / "p.parquet", 1, size=40)
    edit(path, jpg_0=wide("red"), label_0=1.0, label_1=0.0)
    pair = fill(PickAPicParquet(path), SDXL(sdxl_path), tmp_path / "cache", 32).pair(0)
    assert pair.winner_geometry.tolist() == [[40, 80, 0, 16, 32, 32]]
    assert pair.loser_geometry.tolist() == [[40, 40, 0, 0, 32, 32]]


def test_a_second_fill_encodes_nothing(sdxl_path, pairs, tmp_path, monkeypatch):
    first = fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32)
    family = SDXL(sdxl_path)

    def refuse(*_):
        raise AssertionError("asked to encode what is in the cache")

    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(family, name, refuse)
    second = fill(PickAPicParquet(pairs), family, tmp_path, 32)
    same(first, second)
    assert second.report == first.report
    # Without the index of this source the shards still hold everything.
    next(tmp_path.glob("pairs-*.safetensors")).unlink()
    same(first, fill(PickAPicParquet(pairs), family, tmp_path, 32))
    next(tmp_path.glob("pairs-*.safetensors")).write_bytes(b"damaged")
    same(first, fill(PickAPicParquet(pairs), family, tmp_path, 32))


def test_images_and_prompts_are_stored_once_however_many_pairs_use_them(counted, pairs, tmp_path):
    family, calls = counted
    rows = [row for row in pq.read_table(pairs).to_pylist() if row["label_0"] != 0.5]
    swapped = [{**row, "label_0": row["label_1"], "label_1": row["label_0"]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows + swapped), tmp_path / "both.parquet")
    cached = fill(PickAPicParquet(tmp_path / "both.parquet"), family, tmp_path / "cache", 32)
    assert len(cached) == 16
    assert len(set(cached.keys)) == 16
    assert sum(calls["images"]) == 16
    assert sorted(calls["prompts"]) == sorted({"", *cached.prompts})
    assert torch.equal(cached.pair(0).winner.mean, cached.pair(8).loser.mean)


def test_exact_duplicates_are_left_out_and_counted(counted, pairs, tmp_path):
    family, _ = counted
    rows = [row for row in pq.read_table(pairs).to_pylist() if row["label_0"] != 0.5]
    pq.write_table(pa.Table.from_pylist([rows[0], *rows, rows[3]]), tmp_path / "twice.parquet")
    cached = fill(PickAPicParquet(tmp_path / "twice.parquet"), family, tmp_path / "cache", 32)
    assert len(cached) == len(rows) == cached.report.kept
    assert cached.report.dropped == {"duplicate pair": 2}
    assert cached.report.examples["duplicate pair"] == ["twice.parquet:1", "twice.parquet:9"]
    assert cached.report.rows == len(rows) + 2


def test_labels_are_kept_with_their_pairs(counted, pairs, tmp_path):
    """A tie of pictures that were decided on another time is another pair; a second tie of them is a duplicate."""
    family, _ = counted
    rows = pq.read_table(pairs).to_pylist()
    first = next(row for row in rows if row["label_0"] != 0.5)
    again = {**first, "label_0": 0.5, "label_1": 0.5}
    pq.write_table(pa.Table.from_pylist([*rows, again, again]), tmp_path / "ties.parquet")
    source = PickAPicParquet(tmp_path / "ties.parquet", ties="half")
    made = fill(source, family, tmp_path / "cache", 32)
    read = fill(source, family, tmp_path / "cache", 32)
    for cached in (made, read):
        assert [cached.pair(index).label for index in range(11)] == [max(r["label_0"], r["label_1"]) for r in rows] + [
            0.5
        ]
        assert (cached.report.kept, cached.report.ties, cached.report.dropped) == (11, 3, {"duplicate pair": 1})
    decided = fill(PickAPicParquet(tmp_path / "ties.parquet"), family, tmp_path / "cache", 32)
    assert [decided.pair(index).label for index in range(8)] == [1.0] * 8
    assert decided.fingerprint != made.fingerprint
    assert set(decided.keys) < set(made.keys)


def test_keys_follow_content_and_not_place(sdxl_path, pairs, tmp_path):
    family = SDXL(sdxl_path)
    rows = pq.read_table(pairs).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "reversed.parquet")
    forwards = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 32)
    backwards = fill(PickAPicParquet(tmp_path / "reversed.parquet"), family, tmp_path / "cache", 32)
    assert forwards.keys == backwards.keys[::-1]
    assert forwards.fingerprint != backwards.fingerprint


@pytest.mark.parametrize("what", ["image", "caption"])
def test_an_edited_row_is_encoded_again_and_nothing_else(counted, pairs, tmp_path, what):
    family, calls = counted
    path = shutil.copy(pairs, tmp_path / "p.parquet")
    before = fill(PickAPicParquet(path), family, tmp_path / "cache", 32)
    calls["images"].clear()
    calls["prompts"].clear()
    other = pq.read_table(save_random_pairs(tmp_path / "other.parquet", 1, size=40, seed=9)).to_pylist()[0]
    edit(path, **({"jpg_0": other["jpg_0"]} if what == "image" else {"caption": "quite another"}))
    after = fill(PickAPicParquet(path), family, tmp_path / "cache", 32)
    assert calls["images"] == ([1] if what == "image" else [])
    assert calls["prompts"] == (["quite another"] if what == "caption" else [])
    assert before.keys[1:] == after.keys[1:]
    assert before.keys[0] != after.keys[0]
    assert before.fingerprint != after.fingerprint


def test_another_vae_resolution_or_text_encoder_is_a_miss(counted, sdxl_path, pairs, tmp_path, monkeypatch):
    family, _ = counted
    first = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 32)
    other = save_random_sdxl(tmp_path / "other", seed=3)
    family, calls = counting(SDXL(sdxl_path, vae=other), monkeypatch)
    second = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 32)
    assert sum(calls["images"]) == 16
    assert calls["prompts"] == []
    assert not torch.equal(first.pair(0).winner.mean, second.pair(0).winner.mean)
    smaller = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 16)
    assert smaller.pair(0).winner.mean.shape[-2:] == (4, 4)
    assert len({first.fingerprint, second.fingerprint, smaller.fingerprint}) == 3
    family, calls = counting(SDXL(other, vae=sdxl_path), monkeypatch)
    fourth = fill(PickAPicParquet(pairs), family, tmp_path / "cache", 32)
    assert calls["images"] == []
    assert len(calls["prompts"]) == len(fourth.prompts) + 1
    assert fourth.fingerprint != first.fingerprint
    assert fourth.keys == first.keys


class Killed(BaseException):
    """Like a KeyboardInterrupt: nothing may catch it."""


def test_a_killed_fill_goes_on_from_its_complete_shards(sdxl_path, pairs, tmp_path, monkeypatch):
    whole = fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path / "whole", 32, images_per_batch=2, bytes_per_shard=1)
    family = SDXL(sdxl_path)
    encode, done = family.encode_images, []

    def dies(pixels):
        if len(done) == 3:
            raise Killed
        done.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(family, "encode_images", dies)
    with pytest.raises(Killed):
        fill(PickAPicParquet(pairs), family, tmp_path / "cut", 32, images_per_batch=2, bytes_per_shard=1)
    assert len(list((tmp_path / "cut").glob("moments-*/*.safetensors"))) == 3
    family, calls = counting(SDXL(sdxl_path), monkeypatch)
    resumed = fill(PickAPicParquet(pairs), family, tmp_path / "cut", 32, images_per_batch=2, bytes_per_shard=1)
    assert sum(calls["images"]) == 16 - 6
    same(whole, resumed)


def test_a_write_that_dies_leaves_no_shard_and_no_rest(sdxl_path, pairs, tmp_path, monkeypatch):
    def half(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lora_dpo.atomic.write", half)
        with pytest.raises(Killed):
            fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_damaged_shard_is_encoded_again(sdxl_path, pairs, tmp_path):
    first = fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32)
    (shard,) = tmp_path.glob("moments-*/*.safetensors")
    kept = shutil.copy(shard, tmp_path / "kept")
    shard.write_bytes(shard.read_bytes()[:-100])
    second = fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32)
    assert shard.read_bytes() == kept.read_bytes()
    same(fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path / "fresh", 32), second)
    assert first.keys == second.keys


def test_disk_errors_are_explained(sdxl_path, pairs, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_dpo.atomic.write", full)
    with pytest.raises(UserError, match="no space left"):
        fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path / "cache", 32)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path / "file", 32)


def test_moments_that_are_not_finite_name_their_origin(counted, pairs, tmp_path, monkeypatch):
    family, _ = counted
    family.encode_images(torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        family._autoencoder().encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(LoraDpoError, match=r"pairs\.parquet:\d.*NaN or infinite values for a picture") as caught:
        fill(PickAPicParquet(pairs), family, tmp_path, 32)
    assert "name another VAE with base.vae" in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_of_a_batch_only_the_bad_picture_is_named(counted, pairs, tmp_path, monkeypatch):
    family, _ = counted
    encode = family.encode_images

    def spoilt(pixels):
        pixels = pixels.clone()
        pixels[2, 0, 0, 0] = float("nan")
        return encode(pixels)

    monkeypatch.setattr(family, "encode_images", spoilt)
    with pytest.raises(NotFiniteError) as first:
        family.encode_images(torch.rand(3, 3, 32, 32))
    assert first.value.images == [2]
    second = list(PickAPicParquet(pairs))[1].origin  # two pictures a pair: the third is the second pair's
    with pytest.raises(LoraDpoError, match="for a picture") as caught:
        fill(PickAPicParquet(pairs), family, tmp_path, 32)
    assert str(caught.value).startswith(f"{second}: ")


def test_a_resolution_the_vae_cannot_take(sdxl_path, pairs, tmp_path):
    for resolution in (30, 0, -4):
        with pytest.raises(UserError, match="positive multiple of 4"):
            fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, resolution)


def test_progress_counts_pairs_and_prompts(sdxl_path, pairs, tmp_path):
    told = []
    fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32, lambda *what: told.append(what))
    images = [(done, total) for done, total, what in told if what == "encoding images"]
    assert images == sorted(set(images))
    assert {total for _, total in images} == {10}
    assert (images[0], images[-1]) == ((0, 10), (10, 10))
    assert told[len(images) :] == [(0, 6, "encoding prompts"), (6, 6, "encoding prompts")]


def test_with_a_limit_progress_counts_pairs(sdxl_path, pairs, tmp_path):
    told = []
    source = PickAPicParquet(pairs, limit=3)
    fill(source, SDXL(sdxl_path), tmp_path, 32, lambda *what: told.append(what))
    assert [told for told in told if told[2] == "encoding images"] == [(n, 3, "encoding images") for n in range(4)]


class Own(PreferenceSource):
    """A source that keeps to the contract and to nothing else."""

    def __init__(self, preferences):
        self.preferences, self.report = preferences, SourceReport()

    def __iter__(self):
        self.report = SourceReport(rows=len(self.preferences), kept=len(self.preferences))
        yield from self.preferences

    def fingerprint(self):
        return str(len(self.preferences))


def test_any_source_will_do_and_odd_prompts_too(sdxl_path, pairs, tmp_path):
    first, second, *_ = PickAPicParquet(pairs)
    prompts = ["ein 猫 \u202e\0 \n", "  ", "é"]
    made = [Preference(prompt, first.winner, second.loser, "own") for prompt in prompts]
    cached = fill(Own(made), SDXL(sdxl_path), tmp_path, 32)
    assert cached.prompts == prompts
    same(cached, fill(Own(made), SDXL(sdxl_path), tmp_path, 32))
    with pytest.raises(UserError, match="no usable pair"):
        fill(Own([]), SDXL(sdxl_path), tmp_path, 32)


def test_the_index_holds_no_pictures(sdxl_path, pairs, tmp_path):
    fill(PickAPicParquet(pairs), SDXL(sdxl_path), tmp_path, 32)
    (index,) = tmp_path.glob("pairs-*.safetensors")
    assert index.stat().st_size < 4000


def test_more_shards_than_may_be_open_are_read_in_any_order(tmp_path):
    store = Store(tmp_path, {}, bytes_per_shard=1)
    count = OPEN_SHARDS + 10
    for index in range(count):
        store.add([f"k{index}"], {"x": torch.full((1, 2), float(index))})
    places = [Store(tmp_path, {}).place(f"k{index}") for index in range(count)]
    reader = Reader([tmp_path / name for name, _ in places])
    for index in [*range(count), 0, count - 1, 5]:
        assert reader.read(index, places[index][1])["x"].tolist() == [[float(index)] * 2]
    assert len(reader._open) == OPEN_SHARDS
