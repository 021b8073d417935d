"""Sources: who won, what is left out and why, and that no bytes of any kind make them crash."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_dpo.data import split_by_prompt
from lora_dpo.data.folder import open_folder
from lora_dpo.data.images import decode, to_pixels
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.errors import UserError
from tests.support.models import png, save_random_pairs

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (102, 102, 102)


def picture(colour=RED, mode="RGB", size=(16, 16), form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def row(**changes) -> dict:
    good = {"jpg_0": picture(RED), "jpg_1": picture(BLUE), "label_0": 1.0, "label_1": 0.0, "caption": "a square"}
    return {**good, **changes}


def table(path: Path, *rows: dict, schema=None) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=2)
    return path


# Images


@pytest.mark.parametrize(("mode", "form"), [("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")])
def test_every_mode_becomes_rgb(mode, form):
    image = decode(picture(GREY, mode, form=form), "here")
    assert image.mode == "RGB"
    assert image.size == (16, 16)
    if mode != "1":
        assert np.abs(np.asarray(image).astype(int) - 102).max() <= 4


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), "here").getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_pictures_lie_on_white(form):
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, form)
    assert decode(buffer.getvalue(), "here").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), BLUE)
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), "here").size == (10, 20)


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def noisy(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "decoded"),
        (b"not an image", "decoded"),
        (noisy("PNG")[:5000], "decoded"),
        (noisy("JPEG")[:900], "decoded"),
        (animation(), "animated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decoded"),
    ],
)
def test_refused_pictures_say_what_and_where(data, said):
    with pytest.raises(UserError, match=said) as caught:
        decode(data, "file:7")
    assert caught.value.where == "file:7"


def test_a_decompression_bomb_is_refused_before_it_unpacks():
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 6_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + picture()[33:]
    )
    with pytest.raises(UserError, match="20000×6000 pixels"):
        decode(data, "bomb")


@settings(max_examples=80, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF"]),
)
def test_random_bytes_never_escape_as_another_error(data, magic):
    with contextlib.suppress(UserError):
        assert decode(magic + data, "random").mode == "RGB"


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_one_changed_byte_never_escapes_as_another_error(place, change, form):
    data = bytearray(picture(form=form))
    data[place % len(data)] ^= change
    with contextlib.suppress(UserError):
        assert decode(bytes(data), "damaged").mode == "RGB"


def test_pixels_are_channel_first_in_unit_range():
    pixels = to_pixels(decode(picture(RED), "here"))
    assert pixels.shape == (3, 16, 16)
    assert pixels[0].min() == 1
    assert pixels[1:].max() == 0


# Parquet in Pick-a-Pic's columns


def test_label_0_one_means_that_jpg_0_is_preferred(tmp_path):
    path = table(tmp_path / "p.parquet", row(), row(label_0=0.0, label_1=1.0))
    first, second = PickAPicParquet(path)
    assert (first.winner, first.loser) == (picture(RED), picture(BLUE))
    assert first.origin == "p.parquet:0"
    assert (second.winner, second.loser) == (picture(BLUE), picture(RED))
    assert second.origin == "p.parquet:1"


def test_bad_rows_are_counted_by_reason_and_good_ones_survive(tmp_path):
    bad = {
        "tie": row(label_0=0.5, label_1=0.5),
        "missing label": row(label_0=None),
        "label out of range": row(label_0=3.0, label_1=-2.0),
        "contradictory labels": row(label_1=1.0),
        "blank caption": row(caption=" \n"),
        "missing caption": row(caption=None),
        "identical images": row(jpg_1=picture(RED)),
        "missing image": row(jpg_0=None),
        "undecodable image": row(jpg_0=b"\xff\xd8 broken"),
    }
    nan = row(label_0=float("nan"))
    path = table(tmp_path / "p.parquet", row(caption="first"), *bad.values(), nan, row(caption="lást ✓ 猫"))
    source = PickAPicParquet(path)
    assert [pair.prompt for pair in source] == ["first", "lást ✓ 猫"]
    assert source.report.dropped == {**dict.fromkeys(bad, 1), "missing label": 2}
    assert source.report.rows == len(bad) + 3
    assert source.report.kept == 2
    assert source.report.examples["tie"] == ["p.parquet:1"]
    assert "3.0" in source.report.examples["label out of range"][0]
    assert [pair.prompt for pair in source] == ["first", "lást ✓ 猫"]
    assert source.report.kept == 2


def test_ties_are_kept_on_request(tmp_path):
    path = table(
        tmp_path / "p.parquet", row(), row(caption="even", label_0=0.5, label_1=0.5), row(label_0=0.0, label_1=1.0)
    )
    source = PickAPicParquet(path, ties="half")
    assert [(pair.prompt, pair.label) for pair in source][1] == ("even", 0.5)
    assert [pair.label for pair in source] == [1.0, 0.5, 1.0]
    assert (source.report.kept, source.report.ties) == (3, 1)
    assert source.report.summary() == "3 rows: 3 kept (1 ties)"
    assert source.fingerprint() != PickAPicParquet(path).fingerprint()
    assert [pair.label for pair in PickAPicParquet(path)] == [1.0, 1.0]


def test_has_label_false_is_a_missing_label(tmp_path):
    path = table(tmp_path / "p.parquet", row(has_label=True), row(has_label=False))
    source = PickAPicParquet(path)
    assert len(list(source)) == 1
    assert source.report.dropped == {"missing label": 1}


def test_missing_columns_are_named_all_at_once(tmp_path):
    path = table(tmp_path / "p.parquet", {"jpg_0": b"x", "prompt": "p", "label_0": 1.0})
    with pytest.raises(UserError, match=r"no column jpg_1, caption, user \(it has jpg_0, prompt, label_0\)"):
        PickAPicParquet(path, filter={"user": 1})
    with pytest.raises(UserError, match="no column absent"):
        PickAPicParquet(table(path, row()), columns={"split": "absent"})


def test_columns_are_mapped_and_a_renamed_label_stands_alone(tmp_path):
    path = table(tmp_path / "p.parquet", {**row(), "clean": 0.0, "prompt": "mapped"})
    (pair,) = PickAPicParquet(path, columns={"label_0": "clean", "caption": "prompt"})
    assert pair.prompt == "mapped"
    assert pair.winner == picture(BLUE)
    with pytest.raises(UserError, match="lable_0"):
        PickAPicParquet(path, columns={"lable_0": "clean"})


def test_image_structs_of_datasets_are_read(tmp_path):
    nested = row(jpg_0={"bytes": picture(RED), "path": None}, jpg_1={"bytes": picture(BLUE), "path": "b.png"})
    assert [pair.winner for pair in PickAPicParquet(table(tmp_path / "p.parquet", nested))] == [picture(RED)]


def test_image_columns_of_another_type_are_refused(tmp_path):
    with pytest.raises(UserError, match="column jpg_1 holds string"):
        PickAPicParquet(table(tmp_path / "p.parquet", row(jpg_1="b.png")))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_captions_of_every_string_type(tmp_path, kind):
    captions = pa.array(["é", "two"]).cast(kind)
    columns = {name: [row()[name]] * 2 for name in ("jpg_0", "jpg_1", "label_0")}
    pq.write_table(pa.table({**columns, "caption": captions}), tmp_path / "p.parquet")
    assert [pair.prompt for pair in PickAPicParquet(tmp_path / "p.parquet")] == ["é", "two"]


def test_a_caption_that_is_not_utf8_costs_one_row(tmp_path):
    captions = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    columns = {name: [row()[name]] * 3 for name in ("jpg_0", "jpg_1", "label_0")}
    pq.write_table(pa.table({**columns, "caption": captions}), tmp_path / "p.parquet")
    source = PickAPicParquet(tmp_path / "p.parquet")
    assert [pair.prompt for pair in source] == ["good", "fine"]
    assert source.report.dropped == {"caption is not UTF-8": 1}


def test_the_split_column_selects(tmp_path):
    rows = [row(caption=f"p{i}", split="heldout" if i % 3 == 0 else "train") for i in range(6)]
    path = table(tmp_path / "p.parquet", *rows)
    train, heldout = PickAPicParquet(path, split="train"), PickAPicParquet(path, split="heldout")
    assert [pair.prompt for pair in train] == ["p1", "p2", "p4", "p5"]
    assert [pair.prompt for pair in heldout] == ["p0", "p3"]
    assert train.report.rows == 4
    assert train.report.elsewhere == {"heldout": 2}
    assert train.fingerprint() != heldout.fingerprint()
    with pytest.raises(UserError, match="4 in split 'train', 2 in split 'heldout'"):
        list(PickAPicParquet(path, split="validation"))


def test_without_a_split_column_prompts_are_divided_and_none_leaks(tmp_path):
    path = save_random_pairs(tmp_path / "p.parquet", 60, size=8)
    sides = {
        split: [pair.prompt for pair in PickAPicParquet(path, split=split, heldout_split="test", heldout_fraction=0.4)]
        for split in ("train", "test")
    }
    assert len(sides["train"]) + len(sides["test"]) == 60
    assert sides["test"]
    assert not set(sides["train"]) & set(sides["test"])


def test_filter_and_limit(tmp_path):
    path = save_random_pairs(tmp_path / "p.parquet", 12, size=8)
    source = PickAPicParquet(path, filter={"user_id": [0, 2]}, limit=3)
    assert [pair.origin for pair in source] == ["p.parquet:0", "p.parquet:2", "p.parquet:3"]
    assert source.report.dropped == {"filtered out": 1}


def test_directories_and_globs_are_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a"):
        table(tmp_path / f"{name}.parquet", row(caption=name))
    assert [pair.origin for pair in PickAPicParquet(tmp_path)] == ["a.parquet:0", "b.parquet:0"]
    assert [pair.prompt for pair in PickAPicParquet(str(tmp_path / "[ab].parquet"))] == ["a", "b"]


def test_files_that_are_not_there_or_not_parquet(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no")
    for path in ("nowhere.parquet", "empty", "*.nothing", "text.parquet"):
        with pytest.raises(UserError):
            PickAPicParquet(tmp_path / path)


def test_a_damaged_row_group_is_named(tmp_path):
    path = table(tmp_path / "p.parquet", *[row(caption=f"p{i}") for i in range(8)])
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"p\.parquet: .*damaged"):
        list(PickAPicParquet(path))


def test_no_usable_row_lists_the_counts(tmp_path):
    path = table(tmp_path / "p.parquet", row(label_0=0.5, label_1=0.5), row(caption=""))
    with pytest.raises(UserError, match=r"2 rows: 0 kept, 1 tie, 1 blank caption"):
        list(PickAPicParquet(path))


def test_the_fingerprint_follows_the_bytes(tmp_path):
    path = save_random_pairs(tmp_path / "p.parquet", 3, size=8)
    before = PickAPicParquet(path).fingerprint()
    assert before == PickAPicParquet(path).fingerprint()
    save_random_pairs(path, 3, size=8, seed=1)
    assert PickAPicParquet(path).fingerprint() != before


GOOD_IMAGES = st.sampled_from([picture(RED), picture(BLUE)])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "jpg_0": st.none() | st.binary(max_size=40) | GOOD_IMAGES,
                "jpg_1": st.none() | st.binary(max_size=40) | GOOD_IMAGES,
                "label_0": st.none() | st.floats() | st.sampled_from([0.0, 0.5, 1.0]),
                "label_1": st.none() | st.floats() | st.sampled_from([0.0, 0.5, 1.0]),
                "caption": st.none() | st.text(st.characters(codec="utf-8"), max_size=8),
            }
        ),
        max_size=5,
    )
)
def test_garbage_rows_never_crash_and_every_row_is_counted(tmp_path, rows):
    schema = pa.schema(
        {
            "jpg_0": pa.binary(),
            "jpg_1": pa.binary(),
            "label_0": pa.float64(),
            "label_1": pa.float64(),
            "caption": pa.string(),
        }
    )
    source = PickAPicParquet(table(tmp_path / "p.parquet", row(), *rows, schema=schema))
    kept = list(source)
    assert len(kept) == source.report.kept >= 1
    assert source.report.rows == len(rows) + 1 == source.report.kept + source.report.dropped.total()


# JSONL folder


def folder(path: Path, *lines: object, name="pairs.jsonl") -> Path:
    rng = np.random.default_rng(0)
    (path / "images").mkdir(exist_ok=True)
    for image in ("a", "b", "ü ✓"):
        (path / "images" / f"{image}.png").write_bytes(png(rng, 8))
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (path / name).write_text(text + "\n", encoding="utf-8")
    return path


A, B = "images/a.png", "images/b.png"


@pytest.mark.parametrize(("value", "winner"), [("a", A), ("b", B), (1, A), (0, B), (1.0, A)])
def test_both_forms_of_a_row(tmp_path, value, winner):
    folder(
        tmp_path,
        {"prompt": "p", "winner": A, "loser": B},
        {"prompt": "q", "image_a": A, "image_b": B, "preference": value},
    )
    first, second = open_folder(tmp_path)
    assert first.winner == (tmp_path / A).read_bytes()
    assert first.origin == "pairs.jsonl:1"
    assert second.winner == (tmp_path / winner).read_bytes()


@pytest.mark.parametrize(("value", "winner", "label"), [(0.8, A, 0.8), (0.25, B, 0.75), (0.5, A, 0.5), ("tie", A, 0.5)])
def test_a_share_of_votes_is_a_label(tmp_path, value, winner, label):
    folder(tmp_path, {"prompt": "q", "image_a": A, "image_b": B, "preference": value})
    (pair,) = open_folder(tmp_path, ties="half")
    assert pair.winner == (tmp_path / winner).read_bytes()
    assert pair.label == label


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), False])
def test_a_label_outside_of_0_to_1_is_refused(tmp_path, value):
    folder(tmp_path, {"prompt": "q", "image_a": A, "image_b": B, "preference": value})
    with pytest.raises(UserError, match="bad preference"):
        list(open_folder(tmp_path))


def test_bad_lines_are_counted_with_their_place(tmp_path):
    (tmp_path / "box").mkdir()
    (tmp_path / "outside.png").write_bytes(picture())
    root = folder(
        tmp_path / "box",
        {"prompt": "gut ü ✓", "winner": "images/ü ✓.png", "loser": B},
        "{broken",
        "",
        "[1, 2]",
        "[" * 100_000,
        {"winner": A, "loser": B},
        {"prompt": "\ud800", "winner": A, "loser": B},
        {"prompt": "p", "winner": A},
        {"prompt": "p", "winner": A, "loser": "../outside.png"},
        {"prompt": "p", "winner": A, "loser": str(tmp_path / "outside.png")},
        {"prompt": "p", "winner": A, "loser": "images/none.png"},
        {"prompt": "p", "winner": A, "loser": "nul\x00"},
        {"prompt": "p", "winner": A, "loser": "x" * 5000},
        {"prompt": "p", "image_a": A, "image_b": B, "preference": "c"},
        {"prompt": "p", "image_a": A, "image_b": B, "preference": True},
        {"prompt": "p", "image_a": A, "image_b": B, "preference": [1]},
        {"prompt": "p", "image_a": A, "image_b": B, "preference": "tie"},
        {"prompt": "p", "image_a": A, "image_b": B, "preference": 0.5},
        {"prompt": "p", "winner": A, "loser": A},
        {"prompt": "p", "winner": A, "loser": "pairs.jsonl"},
    )
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with (root / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "winner": A, "loser": "link.png"}) + "\n")
    source = open_folder(root)
    assert [pair.prompt for pair in source] == ["gut ü ✓"]
    assert source.report.dropped == {
        "not JSON": 2,
        "not a JSON object": 1,
        "missing caption": 1,
        "caption is not UTF-8": 1,
        "missing key": 1,
        "image outside the folder": 3,
        "missing image": 3,
        "bad preference": 3,
        "tie": 2,
        "identical images": 1,
        "undecodable image": 1,
    }
    assert source.report.examples["not JSON"][0].startswith("pairs.jsonl:2: ")
    assert source.report.examples["not a JSON object"][0].startswith("pairs.jsonl:4: ")
    assert source.fingerprint() == open_folder(root).fingerprint()


def test_the_folders_fingerprint_follows_lines_and_pictures(tmp_path):
    folder(tmp_path, {"prompt": "p", "winner": A, "loser": B})
    seen = {open_folder(tmp_path).fingerprint()}
    (tmp_path / A).write_bytes(picture())
    seen.add(open_folder(tmp_path).fingerprint())
    folder(tmp_path, {"prompt": "q", "winner": A, "loser": B})
    seen.add(open_folder(tmp_path).fingerprint())
    assert len(seen) == 3


def test_rows_name_their_split_or_are_divided_by_prompt(tmp_path):
    lines = [{"prompt": f"p{i}", "winner": A, "loser": B} for i in range(30)]
    folder(tmp_path, {**lines[0], "prompt": "own", "split": "heldout"}, *lines)
    train = {pair.prompt for pair in open_folder(tmp_path, split="train", heldout_fraction=0.3)}
    heldout = {pair.prompt for pair in open_folder(tmp_path, split="heldout", heldout_fraction=0.3)}
    assert "own" in heldout
    assert not train & heldout
    assert len(train | heldout) == 31
    assert len(heldout) > 1


def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_folder(tmp_path / "none")
    with pytest.raises(UserError, match="no table in this folder"):
        open_folder(tmp_path)
    folder(tmp_path, {"prompt": "x", "winner": A, "loser": B}, name="x.jsonl")
    assert len(list(open_folder(tmp_path))) == 1
    folder(tmp_path, {"prompt": "y", "winner": A, "loser": B}, name="y.jsonl")
    with pytest.raises(UserError, match=r"several .*x\.jsonl, y\.jsonl"):
        open_folder(tmp_path)
    folder(tmp_path, "\ufeff" + json.dumps({"prompt": "z", "winner": A, "loser": B}))
    assert [pair.prompt for pair in open_folder(tmp_path)] == ["z"]


def test_a_useless_file_is_an_error(tmp_path):
    folder(tmp_path, "nothing", "of use")
    with pytest.raises(UserError, match=r"2 rows: 0 kept, 2 not JSON"):
        list(open_folder(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from([A, B, "a", "tie"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(["prompt", "winner", "loser", "image_a", "image_b", "preference", "split"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=5).map(json.dumps) | st.text(max_size=20), max_size=5))
def test_garbage_lines_never_crash(tmp_path, lines):
    folder(tmp_path, {"prompt": "good", "winner": A, "loser": B}, *lines)
    source = open_folder(tmp_path)
    assert len(list(source)) == source.report.kept >= 1
    assert source.report.rows == source.report.kept + source.report.dropped.total()
    assert source.fingerprint()


# The division by prompt


def test_the_division_is_a_function_of_what_the_encoder_reads():
    prompts = [f"prompt {i}" for i in range(2000)]
    held = [split_by_prompt(prompt, 0.2, 7) == "heldout" for prompt in prompts]
    assert 0.16 < np.mean(held) < 0.24
    assert held != [split_by_prompt(prompt, 0.2, 8) == "heldout" for prompt in prompts]
    assert held == [split_by_prompt(f" {prompt.upper()}\n", 0.2, 7) == "heldout" for prompt in prompts]
    grown = [split_by_prompt(prompt, 0.3, 7) == "heldout" for prompt in prompts]
    assert all(after for before, after in zip(held, grown, strict=True) if before)
    assert {split_by_prompt(prompt, 0.0, 7) for prompt in prompts} == {"train"}
    assert {split_by_prompt(prompt, 1.0, 7) for prompt in prompts} == {"heldout"}
