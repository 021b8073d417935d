"""`lora-dpo data check`: what it counts, that it ends with a report whatever it reads, and what it draws."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lora_dpo import cli, data_check, tinyworld
from lora_dpo.data.lookalikes import BITS, NEAR_BITS, look
from lora_dpo.data.recognise import recognise
from lora_dpo.errors import UserError


def scene(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Width × height; a few rectangles."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(6):
        left, top = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        picture.paste(colour, (int(left), int(top), int(left) + int(rng.integers(4, 24)), int(top) + 8))
    return picture


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def row(first: int, second: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    pictures = {"jpg_0": encoded(scene(first)), "jpg_1": encoded(scene(second))}
    other = None if label is None else 1 - label
    about = {"user_id": 7, "model_0": "one", "model_1": "other"}
    return {**pictures, "label_0": label, "label_1": other, "caption": f"{first} or {second}", **about, **changes}


def save(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=4)
    return path


@pytest.fixture
def mixed(tmp_path) -> Path:
    same = encoded(scene(30), "JPEG", quality=95, subsampling=0)
    return save(
        tmp_path / "pairs.parquet",
        row(1, 2),
        row(1, 2),
        row(2, 1, 1.0, caption="1 or 2", user_id=8),  # the opposite
        row(3, 4, 0.5),
        row(5, 6, None),
        row(7, 8, caption="a wide one ✓", jpg_0=encoded(scene(7, (64, 16)))),
        row(30, 31, jpg_1=same),
        row(9, 10, jpg_1=b"broken"),
    )


def test_everything_is_counted(mixed, tmp_path):
    found = data_check.run(str(mixed), rows_file=tmp_path / "bad.jsonl", quiet=True)
    assert (found["kind"], found["error"]) == ("pickapic", None)
    assert (found["rows"], found["kept"], found["prompts"], found["pictures"]) == (8, 5, 3, 6)
    assert found["dropped"] == {"tie": 1, "missing label": 1, "undecodable image": 1}
    assert found["users"] == {"different": 2, "most": {"7": 4, "8": 1}}
    assert found["models"]["most"] == {"one": 5, "other": 5}
    assert found["sizes"]["most"] == {"48×32": 5, "64×16": 1}
    assert found["aspect_ratios"]["most"] == {"1.5": 5, "4": 1}
    assert found["duplicates"] == {"rows": 1, "pictures_that_look_like_another": 1, "pairs_that_look_alike": 1}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        ("pairs.parquet:3", "tie"), ("pairs.parquet:4", "missing label"), ("pairs.parquet:7", "undecodable image")
    ]  # fmt: skip


def test_the_label_noise_is_that_of_judgements_that_differ(mixed):
    again = data_check.run(str(mixed), quiet=True)["judged_again"]
    # Three judgements of one pair, of which one differs: two of three couples.
    assert (again["pairs"], again["couples"]) == (1, 3)
    assert again["differ"] == pytest.approx(2 / 3)


def test_the_noise_that_was_put_in_is_estimated(tmp_path):
    rng = np.random.default_rng(0)
    few = [row(first, first + 1) for first in range(0, 40, 2)]
    flipped = {"label_0": 0.0, "label_1": 1.0}
    rows = [{**one, **(flipped if rng.random() < 0.2 else {})} for one in few for _ in range(20)]
    again = data_check.run(str(save(tmp_path / "p.parquet", *rows)), quiet=True)["judged_again"]
    assert again["pairs"] == 20
    assert again["label_noise"] == pytest.approx(0.2, abs=0.05)


def test_damage_in_the_middle_is_reported_with_what_was_read(mixed):
    rows = [row(number, number + 1) for number in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), mixed, row_group_size=4, compression="none", use_dictionary=False)
    data = bytearray(mixed.read_bytes())
    place = data.index(rows[90]["jpg_0"])
    data[place - 20 : place] = b"\xff" * 20
    mixed.write_bytes(data)
    found = data_check.run(str(mixed), quiet=True)
    assert "damaged after row" in found["error"]
    # Rows are read 64 at a time.
    assert found["kept"] == found["rows"] == 64


def test_no_usable_pair_is_a_report_too(tmp_path, capsys):
    path = save(tmp_path / "p.parquet", row(1, 2, None))
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "check", str(path), "--json", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1
    assert (found["rows"], found["kept"], found["dropped"]) == (1, 0, {"missing label": 1})
    assert "no usable pair" in found["error"]


def test_the_sheet_is_the_same_for_a_seed_whatever_the_order(tmp_path):
    rows = [row(number, number + 1, number % 4 / 2 if number % 4 < 3 else 1.0) for number in range(0, 40, 2)]
    sheets = []
    for name, part, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        (tmp_path / name).mkdir()
        path = save(tmp_path / name / "p.parquet", *part)
        data_check.run(str(path), sheet=tmp_path / f"{name}.png", sheet_pairs=3, seed=seed, quiet=True)
        # Below the title and above the rows' numbers.
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png"))[96:296])
    assert (sheets[0] == sheets[1]).all()
    assert (sheets[0] != sheets[2]).any()


def test_the_winner_is_framed_on_the_left(tmp_path):
    path = save(tmp_path / "p.parquet", row(1, 2, 0.0))
    data_check.run(str(path), sheet=tmp_path / "s.png", quiet=True)
    page = Image.open(tmp_path / "s.png").convert("RGB")
    assert page.getpixel((34, 150)) == (0x1A, 0x7F, 0x37)
    inside = page.crop((32 + 5, 96 + 5, 32 + 195, 96 + 195)).getcolors(1 << 20)
    assert inside is not None
    assert {colour for _, colour in inside} >= {scene(2).getpixel((0, 31))}


def test_a_recipe_is_checked_as_it_will_be_read(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "check", "quickstart", "data.limit=5", "--quiet"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "kind pickapic" in out
    assert "5 kept" in out


def test_a_path_takes_no_overrides(mixed):
    with pytest.raises(UserError, match=r"takes no section\.key=value"):
        data_check.run(str(mixed), ["data.limit=3"])


def test_kinds_are_recognised(tmp_path, mixed):
    places = {}
    for name in ("lines", "table", "two", "rankings", "shards", "none"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (places["lines"] / "x.jsonl").write_text('\n{broken\n{"prompt": "p", "winner": "a", "loser": "b"}\n')
    (places["table"] / "x.csv").write_text("prompt,image_a,image_b,preference\n")
    (places["two"] / "winners").mkdir()
    (places["two"] / "losers").mkdir()
    (places["rankings"] / "test.json").write_text('[{"prompt": "p", "image_path": [], "rank": []}]')
    save(places["shards"] / "x.parquet", row(1, 2))
    kinds = {name: recognise(path) for name, path in places.items() if name != "none"}
    assert kinds == {"lines": "folder", "table": "folder", "two": "folder", "rankings": "hpdv2", "shards": "pickapic"}
    assert recognise(mixed) == "pickapic"
    assert recognise(tinyworld.preferences_path()) == "pickapic"
    for path in (places["none"], tmp_path / "nowhere"):
        with pytest.raises(UserError):
            recognise(path)
    (places["table"] / "test.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"x\.csv is of kind folder, test\.json is of kind hpdv2"):
        recognise(places["table"])


COPIES = {
    "jpeg": lambda one: Image.open(io.BytesIO(encoded(one, "JPEG", quality=90))),
    "smaller": lambda one: one.resize((64, 64), Image.Resampling.BICUBIC),
    "brighter": lambda one: one.point(lambda level: min(255, level + 2)),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_picture_looks_like_its_copies_and_not_like_others(change):
    pictures = [scene(seed, (96, 96)) for seed in range(40)]
    looks = [look(picture) for picture in pictures]
    copies = [look(COPIES[change](picture)) for picture in pictures]
    assert len(looks[0].hash) * 8 == BITS
    assert all(one.alike(copy) for one, copy in zip(looks, copies, strict=True))
    assert not any(one.alike(copy) for one in looks for copy in copies if looks.index(one) != copies.index(copy))
    apart = [one.bits_apart(other) for number, one in enumerate(looks) for other in looks[:number]]
    assert min(apart) > NEAR_BITS


@pytest.mark.parametrize("change", ["jpeg", "smaller"])
def test_most_copies_are_found_among_many(tmp_path, change):
    pictures = [scene(seed, (96, 96)) for seed in range(40)]
    rows = [
        row(1, 2, jpg_0=encoded(one), jpg_1=encoded(COPIES[change](pictures[number - 1])), caption=f"{number}")
        for number, one in enumerate(pictures)
    ]
    same = data_check.run(str(save(tmp_path / "p.parquet", *rows)), quiet=True)["duplicates"]
    assert same["pairs_that_look_alike"] == 0
    assert 30 <= same["pictures_that_look_like_another"] <= 40


def test_colours_that_rise_and_fall_alike_are_told_apart():
    def shape(colour: tuple[int, int, int]) -> Image.Image:
        picture = Image.new("RGB", (32, 32), "white")
        picture.paste(colour, (8, 8, 24, 24))
        return picture

    red, green = look(shape((200, 0, 0))), look(shape((0, 102, 0)))
    assert red.bits_apart(green) == 0
    assert not red.alike(green)
    assert red.alike(look(shape((204, 2, 0))))
