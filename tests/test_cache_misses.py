"""What is edited in place, under its old name, is encoded again, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dpo import file_digests
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.data.folder import open_folder
from lora_dpo.data.framing import Framing
from lora_dpo.families.sdxl import SDXL
from tests.support.models import png, save_random_sdxl

PAIRS = 3
PICTURES, PROMPTS = 2 * PAIRS, PAIRS + 1  # the empty one too


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A base model, a folder of pictures with a JSONL file, and a cache of them."""
    import numpy as np

    folder, rng = tmp_path_factory.mktemp("original"), np.random.default_rng(0)
    save_random_sdxl(folder / "base")
    lines = []
    for number in range(PAIRS):
        names = {side: f"{number}-{side}.png" for side in ("winner", "loser")}
        for name in names.values():
            (folder / name).write_bytes(png(rng, 40))
        lines.append(json.dumps({"prompt": f"a picture of {number}"} | names))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    filled(folder).close()
    return folder


@pytest.fixture
def world(original: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, whose digests are remembered at once."""
    monkeypatch.setattr(file_digests, "TICK_SECONDS", 0.0)
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "digests"))
    return Path(shutil.copytree(original, tmp_path / "world"))


def filled(folder: Path, framing: Framing | int = 32, **options) -> CachedPairs:
    return fill(open_folder(folder), SDXL(folder / "base", **options), folder / "cache", framing)


def repainted(folder: Path) -> None:
    """Other pixels, as many bytes, the old times."""
    file = folder / "1-winner.png"
    before, data = file.stat(), bytearray(file.read_bytes())
    other = (folder / "0-winner.png").read_bytes()
    assert data != other
    file.write_bytes(other)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed_caption(folder: Path) -> None:
    file = folder / "pairs.jsonl"
    file.write_text(file.read_text().replace("a picture of 1", "a picture of 7"))


def nudged(*parts: str) -> Callable[[Path], None]:
    """A few weights, by a little."""

    def nudge(folder: Path) -> None:
        file = folder.joinpath("base", *parts)
        weights = load_file(file)
        used = {name: weight for name, weight in weights.items() if not name.startswith(("decoder", "post_quant"))}
        name = max(used, key=lambda name: used[name].numel())
        weights[name] = weights[name].clone()
        weights[name].view(-1)[:8] += 0.01
        save_file(weights, file, {"format": "pt"})

    return nudge


def reconfigured(folder: Path) -> None:
    """The text encoder's activation."""
    file = folder / "base" / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace('"quick_gelu"', '"gelu"'))


def swapped_tokens(folder: Path) -> None:
    file = folder / "base" / "tokenizer_2" / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    table = vocabulary["model"]["vocab"]
    table["a</w>"], table["b</w>"] = table["b</w>"], table["a</w>"]
    file.write_text(json.dumps(vocabulary))


VAE, TEXT_2 = "vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"
EDITS: dict[str, tuple[Callable[[Path], None], tuple[int, int]]] = {
    # The other picture of that content is there.
    "a picture": (repainted, (0, 0)),
    "a caption": (renamed_caption, (0, 1)),
    "a weight of the VAE": (nudged(*VAE.split("/")), (PICTURES, 0)),
    "a weight of a text encoder": (nudged(*TEXT_2.split("/")), (0, PROMPTS)),
    "a text encoder's configuration": (reconfigured, (0, PROMPTS)),
    "a vocabulary": (swapped_tokens, (0, PROMPTS)),
    "the denoiser": (nudged("unet", "diffusion_pytorch_model.safetensors"), (0, 0)),
}


@pytest.mark.parametrize("what", EDITS)
def test_what_is_edited_in_place_is_encoded_again_and_nothing_else(world: Path, what: str) -> None:
    before = filled(world)
    assert before.encoded.total() == 0
    edit, expected = EDITS[what]
    time.sleep(0.02)  # the file system's clock moves on
    edit(world)
    after = filled(world)
    assert (after.encoded["pictures"], after.encoded["prompts"]) == expected
    assert (after.fingerprint == before.fingerprint) == (what == "the denoiser")
    if what == "a picture":
        assert torch.equal(after.pair(1).winner.mean, before.pair(0).winner.mean)
        assert not torch.equal(after.pair(1).winner.mean, before.pair(1).winner.mean)
    if "VAE" in what:
        assert not torch.equal(after.pair(0).winner.mean, before.pair(0).winner.mean)
    if "text encoder" in what:
        assert not torch.equal(after.conditioning([0])["prompt_embeds"], before.conditioning([0])["prompt_embeds"])


def test_a_new_picture_under_an_old_name(world: Path) -> None:
    import numpy as np

    before = filled(world)
    time.sleep(0.02)
    (world / "2-loser.png").write_bytes(png(np.random.default_rng(9), 40))
    after = filled(world)
    assert after.encoded == {"pictures": 1}
    assert after.keys[:2] == before.keys[:2]
    assert after.keys[2] != before.keys[2]


@pytest.mark.parametrize(
    ("framing", "pictures"),
    [
        (Framing(32), 0),
        (Framing(48), PICTURES),
        (Framing(32, crop="top"), PICTURES),
        (Framing(32, aspect="buckets", bucket_step=8), 0),  # square pictures, in the bucket that is that square
    ],
)
def test_another_size_or_crop(world: Path, framing: Framing, pictures: int) -> None:
    assert filled(world, framing).encoded == ({"pictures": pictures} if pictures else {})


def test_another_dtype_of_the_text_encoders(world: Path) -> None:
    assert filled(world, dtype="bfloat16").encoded == {"prompts": PROMPTS}


def test_other_places_and_orders_are_none(world: Path, tmp_path: Path) -> None:
    lines = (world / "pairs.jsonl").read_text().splitlines()
    (world / "pairs.jsonl").write_text("\n".join(lines[::-1]))
    moved = world.rename(tmp_path / "elsewhere")
    assert filled(moved).encoded.total() == 0
