"""`lora-dpo cache` on small models: what training would encode is encoded, checked, shown, and cleared out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_dpo import build, cache_use, cli, recipe
from lora_dpo.cache_store import CHECK
from lora_dpo.families.folder import PipelineFolder
from lora_dpo.families.sdxl import SDXL
from tests.support.models import save_random_pairs, save_random_sdxl
from tests.support.processes import ROOT, environment
from tests.test_launchers import LAUNCHERS

RECIPE = """
name = "small"
[data]
path = "pairs.parquet"
heldout_fraction = 0.3
resolution = 64
[base]
family = "sdxl"
model = "base"
[adapter]
rank = 2
[method]
kind = "dpo"
[train]
steps = 2
batch_pairs = 2
learning_rate = 1e-2
device = "cpu"
[evaluate]
prompts = 0
implicit_pairs = 2
[output]
cache_dir = "{cache}"
trackers = []
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with `small.toml`, its base model, its pairs, and `full`, a filled cache."""
    folder = tmp_path_factory.mktemp("world")
    save_random_sdxl(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 20, ties=2)
    (folder / "small.toml").write_text(RECIPE.format(cache=folder / "full"))
    return folder


@pytest.fixture(scope="module")
def full(world: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineFolder, "unet", refuse("the denoiser"))
        with pytest.raises(SystemExit) as caught:
            cli.main(["cache", str(world / "small.toml"), "--quiet"])
    assert not caught.value.code
    return world / "full"


@pytest.fixture
def cache(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "cache"))


def refuse(what: str):
    def load(*_, **__):
        raise AssertionError(f"{what} was loaded")

    return load


@pytest.fixture
def command(world: Path, tmp_path: Path, capsys, monkeypatch):
    """`lora-dpo cache` on `tmp_path`'s cache: its document, or (exit code, message)."""
    monkeypatch.setattr(PipelineFolder, "unet", refuse("the denoiser"))

    def run(*arguments: str):
        words = ["cache", str(world / "small.toml"), f'output.cache_dir="{tmp_path / "cache"}"', *arguments]
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, "--json"])
        shown = json.loads(capsys.readouterr().out)
        return shown if not caught.value.code else (caught.value.code, shown["error"])

    return run


def shards(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.glob("*-*/*.safetensors")}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def test_training_encodes_nothing_afterwards(world, cache, tmp_path, monkeypatch) -> None:
    learn, patch = build.train, pytest.MonkeyPatch()

    def learns(**settings):
        learned = learn(**settings)
        patch.undo()  # verifying the files goes through stock pipelines, which are whole
        return learned

    for name in ("vae", "text_encoder"):
        patch.setattr(PipelineFolder, name, refuse(f"the {name}"))
    for name in ("encode_images", "encode_prompts"):
        monkeypatch.setattr(SDXL, name, refuse(name))
    monkeypatch.setattr(build, "train", learns)
    settings = recipe.load(str(world / "small.toml"), [f'output.cache_dir="{cache}"'])
    try:
        outcome = build.run(settings, tmp_path / "run", quiet=True)
    finally:
        patch.undo()
    assert outcome.result["steps"] == 2
    assert outcome.result["implicit"]["pairs"] == 2
    assert shards(cache) == shards(world / "full")


def test_filling_says_what_was_done(command, world, tmp_path) -> None:
    first, second = command()["filled"], command()["filled"]
    train, held_out = first["pairs"]["train"], first["pairs"]["heldout"]
    assert (train["pairs"], held_out["pairs"]) == (16, 2)
    assert train["encoded"] == {"pictures": 2 * train["pairs"], "prompts": train["prompts"] + 1}
    assert held_out["encoded"] == {"pictures": 4, "prompts": held_out["prompts"]}  # the empty prompt is there
    assert train["rows"] == train["pairs"] + sum(train["dropped"].values())
    for name, part in second["pairs"].items():
        assert part["encoded"] == {"pictures": 0, "prompts": 0}
        assert {**part, "encoded": None} == {**first["pairs"][name], "encoded": None}
    assert set(command("evaluate.implicit_pairs=0")["filled"]["pairs"]) == {"train"}


def test_sound_rows_are_said_to_be_sound(command, cache) -> None:
    found = command("--verify")["verified"]
    assert found == {
        "shards": len(shards(cache)),
        "bytes": sum(map(len, shards(cache).values())),
        "damaged": [],
    }


def test_what_is_damaged_is_encoded_again(command, cache, full) -> None:
    (moments,) = cache.glob("moments-*")
    (prompts,) = cache.glob("prompts-*")
    flipped, gone = sorted(moments.glob("*.safetensors"))
    cut = sorted(prompts.glob("*.safetensors"))[0]
    flip(flipped)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    found = command("--verify")["verified"]
    named = {damage["file"]: damage["reason"] for damage in found["damaged"]}
    assert "checksum" in named[flipped.relative_to(cache).as_posix()]
    assert named[gone.relative_to(cache).as_posix()] == "it is missing"
    assert cut.relative_to(cache).as_posix() in named
    assert len(named) == 3
    assert shards(cache) == shards(full)
    assert command("--verify")["verified"]["damaged"] == []


def test_a_damaged_index_is_made_from_the_shards_which_are_verified_too(command, cache, full) -> None:
    for index in cache.glob("pairs-*.safetensors"):
        index.write_bytes(b"damaged")
        damaged = index.name
    index.unlink()
    (moments,) = cache.glob("moments-*")
    flipped = sorted(moments.glob("*.safetensors"))[0]
    flip(flipped)
    found = command("--verify")["verified"]["damaged"]
    assert {damage["file"] for damage in found} > {flipped.relative_to(cache).as_posix()}
    assert len(found) == 2
    assert found[0]["file"] != damaged
    assert shards(cache) == shards(full)
    assert command("--verify")["verified"]["damaged"] == []


def test_without_a_filled_cache_there_is_nothing_to_verify(command) -> None:
    code, error = command("--verify")
    assert code == 2
    assert "not in the cache yet" in error


def test_what_stays_damaged_is_an_error(command, cache, monkeypatch) -> None:
    (moments,) = cache.glob("moments-*")
    flip(sorted(moments.glob("*.safetensors"))[0])
    monkeypatch.setattr("lora_dpo.caching.discard", lambda _: False)
    monkeypatch.setattr("lora_dpo.cache.discard", lambda _: False)
    code, error = command("--verify")
    assert code == 1
    assert "still damaged" in error


def test_stats_tell_what_is_there_and_what_of_it_the_recipe_uses(command, cache) -> None:
    other = command("data.limit=5", "evaluate.implicit_pairs=0")["filled"]["pairs"]["train"]
    stats = command("--stats")["stats"]
    moments, prompts = stats["groups"]
    assert moments["about"]["size"] == [64, 64]
    assert len(moments["about"]["vae"]) == len(prompts["about"]["text_encoders"].partition("-")[0]) == 32
    assert moments["rows"] == moments["rows_of_this_recipe"] == 2 * 18
    assert stats["bytes"] == sum(group["bytes"] for group in stats["groups"])
    mine = {pairs["about"].rpartition(", ")[2]: pairs for pairs in stats["pairs"] if pairs["this_recipe"]}
    assert set(mine) == {"train", "heldout"}
    assert [pairs["pairs"] for pairs in stats["pairs"] if not pairs["this_recipe"]] == [other["pairs"]] == [5]
    assert all(pairs["last_use"] and not pairs["in_use"] for pairs in stats["pairs"])
    assert (stats["prunable_files"], stats["unfinished_bytes"]) == (0, 0)
    # 5 pairs of 10 pictures are all that the other one uses.
    assert command("data.limit=5", "evaluate.implicit_pairs=0", "--stats")["stats"]["groups"][0][
        "rows_of_this_recipe"
    ] == 10  # fmt: skip
    empty = command("data.limit=3", "evaluate.implicit_pairs=0", "--stats")["stats"]
    assert empty["this_recipe"] == {"train": None}


def test_stats_of_no_cache(command) -> None:
    stats = command("--stats")["stats"]
    assert (stats["bytes"], stats["groups"], stats["pairs"]) == (0, [], [])


def test_prune_leaves_other_recipes_alone_until_it_is_told_twice(command, cache) -> None:
    command("data.resolution=32")
    before = shards(cache)
    found = command("--prune")["pruned"]
    assert (found["files"], found["bytes"], found["deleted"]) == (0, 0, True)
    listed = command("--prune", "--all-but-this")["pruned"]
    assert listed["deleted"] is False
    assert len(listed["pairs"]) == 2
    assert listed["bytes"] > 1000
    assert shards(cache) == before
    done = command("--prune", "--all-but-this", "--yes")["pruned"]
    assert done["deleted"] is True
    assert done["bytes"] == listed["bytes"]
    assert done["failed"] == []
    assert len(shards(cache)) < len(before)
    assert command()["filled"]["pairs"]["train"]["encoded"] == {"pictures": 0, "prompts": 0}
    assert command("data.resolution=32")["filled"]["pairs"]["train"]["encoded"]["pictures"] > 0


def test_prune_by_last_use(command, cache) -> None:
    command("data.resolution=32", "evaluate.implicit_pairs=0")
    mine = set(command("--stats")["stats"]["this_recipe"].values())
    (lock,) = [path for path in cache.glob("pairs-*.lock") if path.with_suffix(".safetensors").name not in mine]
    now = time.time()
    os.utime(lock, (now - 5 * 86400, now - 5 * 86400))
    assert command("--prune", "--unused-days", "6", "--yes")["pruned"]["files"] == 0
    held = cache_use.hold(lock.with_suffix(".safetensors"), [], "", print)
    os.utime(lock, (now - 5 * 86400, now - 5 * 86400))
    assert command("--prune", "--unused-days", "4", "--yes")["pruned"]["files"] == 0  # in use
    assert held is not None
    held.close()
    os.utime(lock, (now - 5 * 86400, now - 5 * 86400))
    assert command("--prune", "--unused-days", "4", "--yes")["pruned"]["files"] >= 3
    assert not lock.exists()
    # This recipe's own is never too old.
    for path in cache.glob("pairs-*.lock"):
        os.utime(path, (1e9, 1e9))
    assert command("--prune", "--unused-days", "0", "--yes")["pruned"]["files"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--all-but-this"], "belongs to --prune"),
        (["--unused-days", "3"], "belongs to --prune"),
        (["--prune", "--yes"], "nothing to confirm"),
        (["--prune", "--all-but-this", "--unused-days", "3"], "it includes --unused-days"),
    ],
)
def test_options_without_effect_are_refused(command, options, message) -> None:
    code, error = command(*options)
    assert code == 2
    assert message in error


def test_what_people_read(world, cache, capsys) -> None:
    words = ["cache", str(world / "small.toml"), f'output.cache_dir="{cache}"', "--quiet"]

    def text(*options: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, *options])
        assert not caught.value.code
        return capsys.readouterr().out

    (moments,) = cache.glob("moments-*")
    assert "nothing was missing" in text()
    assert "training encodes nothing now" in text()
    assert "all sound" in text("--verify")
    flip(sorted(moments.glob("*.safetensors"))[0])
    assert "1 file damaged, encoded again" in text("--verify")
    assert "64×64" in text("--stats")
    assert "in use now" not in text("--stats")
    held = cache_use.hold(sorted(cache.glob("pairs-*.safetensors"))[0], [], "pairs.parquet, train", print)
    assert "in use now" in text("--stats")
    assert held is not None
    held.close()
    assert "0 files, 0 B freed" in text("--prune")
    words[2:2] = ["data.limit=3"]
    listed = text("--prune", "--all-but-this")
    assert "would be freed" in listed
    assert "add --yes" in listed
    assert "pairs.parquet, train" in listed


def test_the_documents_commands(world, full, tmp_path, monkeypatch, capsys) -> None:
    text = (ROOT / "docs" / "cache.md").read_text("utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    assert len(lines) >= 7
    monkeypatch.chdir(world)
    small = ["small.toml", f'output.cache_dir="{tmp_path / "cache"}"']
    for line in lines:
        if line.startswith("python benchmarks/"):
            continue
        assert "sdxl_lora data.path=/data/pickapic_v2" in line
        words = shlex.split(line.replace("sdxl_lora data.path=/data/pickapic_v2", shlex.join(small)))
        if words[0] == "lora-dpo":
            with pytest.raises(SystemExit) as caught:
                cli.main([*words[1:], "--quiet"])
            assert not caught.value.code, line
    assert shards(tmp_path / "cache") == shards(full)


def test_torchrun_fills_and_one_process_tells(world, full, tmp_path) -> None:
    text = (ROOT / "docs" / "cache.md").read_text("utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("torchrun ")]
    _, *words = shlex.split(line.replace("sdxl_lora data.path=/data/pickapic_v2", str(world / "small.toml")))
    done = subprocess.run(
        [*LAUNCHERS["torchrun"], *words, f'output.cache_dir="{tmp_path / "cache"}"', "--json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["filled"]["pairs"]["train"]["pairs"] == 16  # one document
    # Another number of threads rounds differently, and then the checksums of the rows differ too.
    assert shards(tmp_path / "cache").keys() == shards(full).keys()
    for name in shards(full):
        ours, theirs = (load_file(place / name) for place in (tmp_path / "cache", full))
        for tensors in (ours, theirs):
            tensors.pop(CHECK, None)  # the index of the pairs has none
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
