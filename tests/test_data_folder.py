"""Folders of pictures with a table (CSV, parquet) or as winners/ and losers/: what is read, what a bad row costs."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_dpo.data import PreferenceSource
from lora_dpo.data.folder import open_folder
from lora_dpo.errors import UserError


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


A, B = picture(50), picture(200)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(A)
    (tmp_path / "b, ü ✓.png").write_bytes(B)
    return tmp_path


GOOD = {"prompt": 'two,\n\nparts of "one" 猫', "winner": "b, ü ✓.png", "loser": "a.png"}


def pairs(source: PreferenceSource) -> list[tuple]:
    return [(pair.prompt, pair.winner, pair.loser, pair.label) for pair in source]


# CSV


def save_csv(path: Path, *rows: dict, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_what_a_spreadsheet_saves_is_read(folder, delimiter, encoding):
    compared = {"prompt": "p", "image_a": "a.png", "image_b": "b, ü ✓.png"}
    rows = [GOOD, {**compared, "preference": "B"}, {**compared, "preference": 0.75}, {**compared, "preference": "tie"}]
    save_csv(folder / "pairs.csv", *rows, delimiter=delimiter, encoding=encoding)
    source = open_folder(folder, ties="half")
    assert pairs(source) == [(GOOD["prompt"], B, A, 1.0), ("p", B, A, 1.0), ("p", A, B, 0.75), ("p", A, B, 0.5)]
    assert [pair.origin for pair in source] == [f"pairs.csv:{line}" for line in (2, 5, 6, 7)]
    assert source.total_rows() == source.report.rows == 4


def test_a_broken_record_costs_one_line_and_no_good_row(folder):
    lines = [
        b"prompt,winner,loser",
        b'"never closed,a.png,"b, \xc3\xbc \xe2\x9c\x93.png"',
        b'first,a.png,"b, \xc3\xbc \xe2\x9c\x93.png"',
        b"too,few",
        b"too,many,cells,here",
        b"",
        b'\xff\xfe,a.png,"b, \xc3\xbc \xe2\x9c\x93.png"',
        b'none,,"b, \xc3\xbc \xe2\x9c\x93.png"',
        b"out,a.png,../a.png",
        b'last,a.png,"b, \xc3\xbc \xe2\x9c\x93.png"',
        b'"never closed either,a.png,a.png',
    ]
    (folder / "pairs.csv").write_bytes(b"\r\n".join(lines))
    source = open_folder(folder)
    assert [pair.prompt for pair in source] == ["first", "last"]
    assert source.report.dropped == {
        "not CSV": 2, "wrong number of columns": 2, "caption is not UTF-8": 1, "missing key": 1,
        "image outside the folder": 1,
    }  # fmt: skip
    assert source.report.examples["not CSV"][0].startswith("pairs.csv:2: ")
    assert source.report.rows == source.total_rows() == 9


def test_a_quote_that_is_never_closed_does_not_take_the_rest(folder):
    rows = [f'p{number},a.png,"b, ü ✓.png"' for number in range(200)]
    (folder / "pairs.csv").write_text("\n".join(["prompt,winner,loser", *rows[:100], '"open', *rows[100:]]))
    source = open_folder(folder)
    assert len(list(source)) == 200
    assert source.report.dropped == {"not CSV": 1}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("prompt,winner", "expected the columns prompt, winner, loser, or .* it has 'prompt', 'winner'"),
        ("", "it has none|it has ''"),
        ("prompt,winner,loser,winner", "names winner twice"),
        ("prompt,image_a,image_b", "it has 'prompt', 'image_a', 'image_b'"),
    ],
)
def test_a_table_without_the_columns_says_what_it_has(folder, header, said):
    (folder / "pairs.csv").write_text(f"{header}\nx,a.png,b.png\n" if header else "")
    with pytest.raises(UserError, match=said):
        open_folder(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=60).filter(lambda line: b'"' not in line), max_size=6))
def test_garbage_in_a_csv_never_crashes_and_never_loses_a_good_row(folder, garbage):
    good = b'good,a.png,"b, \xc3\xbc \xe2\x9c\x93.png"'
    (folder / "pairs.csv").write_bytes(b"\n".join([b"prompt,winner,loser", good, *garbage, good]))
    source = open_folder(folder)
    assert [pair.prompt for pair in source].count("good") == 2
    assert source.report.rows == source.report.kept + source.report.dropped.total()
    assert source.fingerprint()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('",\n\r;a ✓\x00'), min_size=1, max_size=12))
def test_any_caption_that_can_be_written_is_read_back(folder, prompt):
    save_csv(folder / "pairs.csv", {**GOOD, "prompt": f"x{prompt}"}, {**GOOD, "prompt": "good"})
    prompts = [pair.prompt for pair in open_folder(folder)]
    assert prompts[-1] == "good"
    assert prompts[0] == f"x{prompt}"


# Parquet


def test_parquet_beside_its_pictures(folder):
    rows = [
        GOOD,
        {"prompt": "p", "image_a": "a.png", "image_b": "b, ü ✓.png", "preference": 0.25},
        {"prompt": None, "winner": "a.png", "loser": "b, ü ✓.png"},
        {"prompt": "none", "winner": "a.png", "loser": "none.png"},
    ]
    columns = {name: pa.array([row.get(name) for row in rows]) for name in (*GOOD, "image_a", "image_b", "preference")}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    source = open_folder(folder)
    assert pairs(source) == [(GOOD["prompt"], B, A, 1.0), ("p", B, A, 0.75)]
    assert source.report.examples == {
        "missing caption": ["pairs.parquet:2: prompt is None"],
        "missing image": ["pairs.parquet:3: no file 'none.png'"],
    }
    assert source.total_rows() == 4


def test_pictures_inside_the_parquet_are_another_kind(folder):
    pq.write_table(pa.table({"prompt": ["p"], "winner": [A], "loser": [B]}), folder / "pairs.parquet")
    with pytest.raises(UserError, match="expected a path, got b'"):
        list(open_folder(folder))
    pq.write_table(pa.table({"caption": ["p"], "jpg_0": [A]}), folder / "pairs.parquet")
    with pytest.raises(UserError, match=r'data\.kind = "pickapic"'):
        open_folder(folder)


def test_the_three_forms_say_the_same(folder):
    rows = [{**GOOD, "prompt": f"p{number}", "split": "heldout" if number % 3 else "train"} for number in range(9)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_csv(folder / "x.csv", *rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    for split in ("train", "heldout"):
        seen = [pairs(open_folder(folder / f"x.{form}", split=split)) for form in ("jsonl", "csv", "parquet")]
        assert seen[0] == seen[1] == seen[2]
        assert len(seen[0]) == (3 if split == "train" else 6)


# winners/ and losers/


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_captions_lie_beside_either_picture_or_above(tmp_path):
    for name, place in {"a": "winners/a", "b": "losers/b", "sub/c.d": "sub/c.d"}.items():
        put(tmp_path / "winners" / f"{name}.png", A)
        put(tmp_path / "losers" / f"{name}.JPG", B)
        put(tmp_path / f"{place}.txt", f"\ufeff caption of {name} ✓\n")
    put(tmp_path / "winners/thumbs.db", b"x")
    put(tmp_path / "losers/.hidden.png", b"x")
    source = open_folder(tmp_path)
    assert pairs(source) == [(f"caption of {name} ✓", A, B, 1.0) for name in ("a", "b", "sub/c.d")]
    assert [pair.origin for pair in source] == ["winners/a.png", "winners/b.png", "winners/sub/c.d.png"]
    assert source.total_rows() == source.report.rows == 3


def test_every_pair_that_cannot_be_used_has_its_reason(tmp_path):
    def pair(
        name: str, winner: bytes | None = A, loser: bytes | None = B, caption: str | bytes | None = "text"
    ) -> None:
        for side, content in (("winners", winner), ("losers", loser)):
            if content is not None:
                put(tmp_path / side / f"{name}.png", content)
        if caption is not None:
            put(tmp_path / f"{name}.txt", caption)

    pair("good")
    put(tmp_path / "winners/good.txt", "text\n")  # the same again
    pair("differ")
    put(tmp_path / "losers/differ.txt", "another text")
    pair("no loser", loser=None)
    pair("no winner", winner=None)
    pair("no caption", caption=None)
    pair("blank", caption=" \n")
    pair("bytes", caption=b"\xff\xfe")
    pair("long", caption="x" * 70_000)
    pair("same", loser=A)
    pair("broken", winner=b"\x89PNG")
    pair("twice")
    put(tmp_path / "winners/twice.jpg", A)
    pair("link", loser=None)
    outside = tmp_path.parent / f"{tmp_path.name}.png"
    put(outside, B)
    (tmp_path / "losers/link.png").symlink_to(outside)
    source = open_folder(tmp_path)
    assert [pair.origin for pair in source] == ["winners/good.png"]
    assert source.report.dropped == {
        "contradictory captions": 1, "missing image": 2, "missing caption": 1, "blank caption": 1,
        "caption is not UTF-8": 1, "caption too long": 1, "identical images": 1, "undecodable image": 1,
        "several images of one name": 1, "image outside the folder": 1,
    }  # fmt: skip
    assert "losers/differ.txt" in source.report.examples["contradictory captions"][0]
    assert source.report.rows == source.total_rows() == 12


def test_names_are_compared_as_unicode_means_them(tmp_path):
    put(tmp_path / "winners" / unicodedata.normalize("NFD", "ü.png"), A)
    put(tmp_path / "losers" / unicodedata.normalize("NFC", "ü.png"), B)
    put(tmp_path / unicodedata.normalize("NFC", "ü.txt"), "p")
    assert pairs(open_folder(tmp_path)) == [("p", A, B, 1.0)]


def test_the_fingerprint_of_two_folders_follows_pictures_and_captions(tmp_path):
    seen = set()
    for path, content in (
        ("winners/a.png", A), ("losers/a.png", B), ("a.txt", "p"), ("a.txt", "q"), ("losers/a.png", picture(9)),
        ("winners/b.png", A),
    ):  # fmt: skip
        put(tmp_path / path, content)
        (tmp_path / "losers").mkdir(exist_ok=True)
        seen.add(open_folder(tmp_path).fingerprint())
        assert open_folder(tmp_path).fingerprint() in seen
    assert len(seen) == 6


def test_a_table_comes_before_the_two_folders_and_empty_ones_are_an_error(folder):
    (folder / "winners").mkdir()
    with pytest.raises(UserError, match="no table in this folder"):
        open_folder(folder)
    (folder / "losers").mkdir()
    with pytest.raises(UserError, match="no picture in winners/ and losers/"):
        open_folder(folder)
    save_csv(folder / "mine.csv", GOOD)
    assert len(list(open_folder(folder))) == 1
    save_csv(folder / "others.tsv", GOOD, delimiter="\t")
    with pytest.raises(UserError, match=r"several tables in this folder \(mine\.csv, others\.tsv\)"):
        open_folder(folder)
    pq.write_table(pa.table({"caption": ["p"], "jpg_0": [A]}), folder / "pairs.parquet")  # of another kind
    save_csv(folder / "pairs.csv", {**GOOD, "prompt": "usual"})
    assert [pair.prompt for pair in open_folder(folder)] == ["usual"]


NAMES = st.sampled_from(["a.png", "b.png", "a.txt", "b.txt", "a.jpg", "ü.png", "b.txt.txt", "x/a.png"])
CONTENT = st.sampled_from([A, B, b"caption", b""]) | st.binary(max_size=30)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from(["winners", "losers", "."]), NAMES), CONTENT, max_size=8))
def test_any_content_of_two_folders_is_counted_and_a_good_pair_survives(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("two")
    for (place, name), content in files.items():
        put(root / place / name, content)
    for side, content in (("winners", A), ("losers", B)):
        put(root / side / "good.png", content)
    put(root / "good.txt", "good")
    source = open_folder(root)
    assert "good" in [pair.prompt for pair in source]
    assert source.report.rows == source.report.kept + source.report.dropped.total() == source.total_rows()
    assert source.fingerprint()
