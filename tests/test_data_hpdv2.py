"""HPDv2's rankings: which pairs they become, where their pictures lie, and that no JSON makes them crash."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_dpo.data import json_stream
from lora_dpo.data.hpdv2 import Rankings, chosen_pairs
from lora_dpo.data.picture_files import BadRow
from lora_dpo.errors import UserError


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


NAMES = [f"{number}.png" for number in range(4)]
PICTURES = {picture(number): number for number in range(4)}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "test").mkdir()
    for content, number in PICTURES.items():
        (tmp_path / "test" / NAMES[number]).write_bytes(content)
    return tmp_path


def save(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def entry(*rank: float, prompt: str = "p", **changes: Any) -> dict[str, Any]:
    return {"prompt": prompt, "image_path": NAMES[: len(rank)], "rank": list(rank), **changes}


def seen(source: Rankings) -> list[tuple[int, int]]:
    return [(PICTURES[pair.winner], PICTURES[pair.loser]) for pair in source]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("all", [(2, 0), (2, 3), (2, 1), (0, 3), (0, 1), (3, 1)]),
        ("adjacent", [(2, 0), (0, 3), (3, 1)]),
        ("best_worst", [(2, 1)]),
    ],
)
def test_a_ranking_becomes_these_pairs(root, pairs, expected):
    path = save(root / "test.json", entry(2, 4, 1, 3, prompt="ü ✓"))
    source = Rankings(path, pairs=pairs)
    assert seen(source) == expected
    assert [pair.origin for pair in source] == [f"test.json:0:{better}>{worse}" for better, worse in expected]
    assert {pair.prompt for pair in source} == {"ü ✓"}
    assert source.total_rows() == source.report.rows == len(expected)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_no_pair_stands_against_the_ranking(places):
    every = chosen_pairs(tuple(places), "all")
    assert len(every) == len({frozenset(pair) for pair in every}) == len(places) * (len(places) - 1) // 2
    for pairs in ("all", "adjacent", "best_worst"):
        chosen = chosen_pairs(tuple(places), pairs)
        assert set(chosen) <= set(every)
        assert all(places[better] <= places[worse] for better, worse in chosen)
    ((best, worst),) = chosen_pairs(tuple(places), "best_worst")
    assert (places[best], places[worst]) == (min(places), max(places))


def test_one_is_the_better_of_two_and_equal_places_are_ties(root):
    two = {"prompt": "p", "file_path": ["test/0.png", "test/1.png"]}
    path = save(root / "train.json", *({**two, "human_preference": said} for said in ([1, 0], [0, 1], [1, 1])))
    source = Rankings(path)
    assert seen(source) == [(0, 1), (1, 0)]
    assert source.report.dropped == {"tie": 1}
    assert [pair.label for pair in Rankings(path, ties="half")] == [1.0, 1.0, 0.5]


def test_several_files_are_splits_and_one_is_divided(root):
    two = {"prompt": "p", "file_path": ["test/0.png", "test/1.png"], "human_preference": [0, 1]}
    save(root / "test.json", *(entry(1, 2, prompt=f"p{number}") for number in range(40)))
    sides = [
        {pair.prompt for pair in Rankings(root, split=split, heldout_fraction=0.4)} for split in ("train", "heldout")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 40
    save(root / "train.json", two)
    assert seen(Rankings(root, split="train", heldout_split="test")) == [(1, 0)]
    assert len(seen(Rankings(root, split="test", heldout_split="test"))) == 40
    assert len(seen(Rankings(root))) == 41
    with pytest.raises(UserError, match=r"no heldout\.json .*test\.json, train\.json"):
        Rankings(root, split="heldout")


def test_bad_entries_are_counted_and_good_ones_survive(root):
    path = save(
        root / "test.json",
        entry(1, 2, prompt="first"),
        {"prompt": "p", "rank": [1, 2]},
        entry(1, 2, prompt=None),
        entry(1, 2, prompt=" "),
        entry(1, 2, rank=[1]),
        entry(1, 2, rank="12"),
        entry(1),
        entry(1, 2, rank=[1, float("nan")]),
        entry(1, 2, rank=[True, 10**400]),
        entry(1, 2, image_path=[1, 2]),
        entry(1, 2, image_path=["0.png", "../0.png"]),
        entry(1, 2, 3, image_path=["0.png", "none.png", "1.png"], prompt="two of three"),
        [1],
        entry(*range(101), image_path=["0.png"] * 101),
        entry(2, 1, prompt="last"),
    )
    source = Rankings(path)
    assert [pair.prompt for pair in source] == ["first", "two of three", "last"]
    assert source.report.dropped == {
        "missing key": 1, "missing caption": 1, "blank caption": 1, "bad ranking": 6, "missing image": 3,
        "image outside the folder": 1, "not a JSON object": 1,
    }  # fmt: skip
    assert source.report.examples["missing key"][0].startswith("test.json:1: ")
    assert source.report.rows == source.total_rows() == 17


def test_a_damaged_file_loses_what_is_damaged(root):
    good = [json.dumps(entry(1, 2, prompt=f"p{number}")) for number in range(4)]
    text = f'[{good[0]}, {{"prompt": "x",, "rank": [1]}}, {good[1]},\n {good[2]}, {good[3][:-9]}'
    (root / "test.json").write_text(text)
    source = Rankings(root / "test.json")
    assert [pair.prompt for pair in source] == ["p0", "p1", "p2"]
    assert source.report.dropped == {"not JSON": 2}


def test_files_longer_than_what_is_held_at_once(root, monkeypatch):
    monkeypatch.setattr(json_stream, "AHEAD", 300)
    entries = [entry(1, 2, prompt=f"ü{number} " + " }, { " * (number % 5)) for number in range(200)]
    for text in (
        json.dumps(entries, ensure_ascii=False),
        "\n".join(map(json.dumps, entries)),
        json.dumps(entries, indent=4),
    ):
        (root / "test.json").write_text("\ufeff" + text, encoding="utf-8")
        assert list(json_stream.values(root / "test.json")) == entries
    (root / "test.json").write_text(
        json.dumps(entries[:50])[:-1] + ", {broken" + "x" * 2000 + "}, " + json.dumps(entries[50:])[1:]
    )
    read = list(json_stream.values(root / "test.json"))
    assert [value for value in read if not isinstance(value, BadRow)] == entries
    assert len(read) == 201


def test_the_fingerprint_follows_pictures_policy_and_file(root):
    path = save(root / "test.json", entry(1, 2))
    seen = {Rankings(path).fingerprint(), Rankings(path, pairs="adjacent").fingerprint()}
    (root / "test/1.png").write_bytes(picture(3))
    seen.add(Rankings(path).fingerprint())
    save(path, entry(2, 1))
    seen.add(Rankings(path).fingerprint())
    assert len(seen) == 4
    assert Rankings(path).fingerprint() in seen


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError):
            Rankings(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["prompt", "image_path", "rank", "file_path", "human_preference"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=5), max_size=4), st.binary(max_size=20))
def test_garbage_entries_never_crash_and_every_one_is_counted(root, garbage, tail):
    save(root / "test.json", entry(1, 2, prompt="good"), *garbage)
    with (root / "test.json").open("ab") as file:
        file.write(tail)
    source = Rankings(root / "test.json")
    assert "good" in [pair.prompt for pair in source]
    assert source.report.rows == source.report.kept + source.report.dropped.total() == source.total_rows()
    assert source.fingerprint()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_random_bytes_are_a_readable_error(root, content):
    (root / "test.json").write_bytes(content)
    with pytest.raises(UserError, match="no usable pair"):
        list(Rankings(root / "test.json"))
