"""`lora-dpo plan`: numbers of steps and pairs, the cache, and whether a card is large enough."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lora_dpo import file_digests, parts, plan, plan_data, recipe
from lora_dpo.cache import fill
from lora_dpo.errors import UserError
from lora_dpo.memory import GIB
from lora_dpo.plan_table import text
from lora_dpo.progress import NoProgress
from tests.support.models import save_random_pairs, save_random_sdxl
from tests.test_cli import run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("world")
    base = save_random_sdxl(root / "base")
    save_random_pairs(root / "pairs.parquet", 20, ties=3)
    return [
        f"base.model={base}", f"base.vae={base / 'vae'}", f"data.path={root / 'pairs.parquet'}", "data.resolution=64",
        "data.aspect=square",
        "data.heldout_fraction=0.2", "train.batch_pairs=8", "train.micro_batch_pairs=2", "train.steps=34",
        f"output.cache_dir={root / 'cache'}",
    ]  # fmt: skip


def test_the_plan_has_what_the_run_will_have(world, capsys) -> None:
    code, out, _ = run(capsys, "plan", "sdxl_lora", *world, "--gpu", "8GB", "--json")
    document = json.loads(out)
    chosen = recipe.load("sdxl_lora", world)
    kept = list(parts.source(chosen, "train"))
    assert code == 0
    assert document["pairs"] == len(kept) == document["data"]["kept"]
    assert set(document["data"]["dropped"]) <= {"tie"}
    assert document["data"]["rows"] == document["data"]["kept"] + sum(document["data"]["dropped"].values())
    assert (document["steps"], document["passes_per_step"], document["pairs_per_pass"]) == (34, 4, 2)
    assert document["epochs"] == pytest.approx(34 * 8 / len(kept), abs=1e-4)
    assert document["buckets"] == {"64×64": len(kept)}
    assert document["fits"] is True
    assert document["gpu_gib"] == 8
    assert (
        0
        < document["peak_gib"]
        < document["needed_gib"]
        == pytest.approx(document["peak_gib"] + document["allowance_gib"], abs=0.002)
    )
    assert set(document["parts_gib"]) == {
        "weights", "adapter", "gradients", "optimizer", "activations", "reference"
    }  # fmt: skip
    shown = text(document)
    assert "yes, " in shown
    assert f"{len(kept)}; " in shown


def test_the_cache_gets_as_large_as_planned_and_is_asked_once_it_is_there(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_digests, "TICK_SECONDS", 0.0)
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    chosen = recipe.load("sdxl_lora", [*world, f"output.cache_dir={tmp_path}"])
    document = plan.run(chosen, quiet=True)
    family = parts.family(chosen, torch.device("cpu"))
    pairs = fill(parts.source(chosen, "train"), family, tmp_path, parts.framing(chosen))
    written = sum((tmp_path / name).stat().st_size for name in pairs.shards())
    assert len(pairs.prompts) == document["cache"]["prompts"]
    assert document["cache"]["bytes"] < written < 1.2 * document["cache"]["bytes"] + 4096  # headers and checksums
    assert not document["cache"]["encoded"]
    monkeypatch.setattr(plan_data, "scan", lambda *_: pytest.fail("the rows were read"))
    again = plan.run(chosen, quiet=True)
    assert again["cache"] == document["cache"] | {"encoded": True}
    assert again["data"] == document["data"] | {"from_cache": True}
    assert again["buckets"] == document["buckets"] == {"64×64": len(pairs)}
    assert "all of them encoded" in text(again)


def test_a_change_of_the_data_is_seen_without_reading_it(world, tmp_path, monkeypatch) -> None:
    """Its digest isn't known, so that the cache can't be asked, and the rows are read."""
    monkeypatch.setattr(file_digests, "TICK_SECONDS", 0.0)
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path))
    monkeypatch.setattr(file_digests, "_read", lambda *_: pytest.fail("a file was read for its digest"))
    found = plan_data.look(recipe.load("sdxl_lora", world), NoProgress())
    assert not found.encoded
    assert found.sizes.total() > 0


def test_exact_duplicates_are_left_out(tmp_path, world) -> None:
    table = pq.read_table(save_random_pairs(tmp_path / "pairs.parquet", 4))
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "pairs.parquet")
    chosen = recipe.load("sdxl_lora", [*world, f"data.path={tmp_path}", "data.heldout_fraction=0.0"])
    found = plan_data.scan(chosen, NoProgress())
    assert (found.pairs(None), found.pictures, found.share) == (4, 8, 1.0)
    assert found.report.dropped == {"duplicate pair": 4}
    assert found.report.kept == 4


def test_a_long_source_is_read_in_part_and_reckoned_up(world) -> None:
    chosen = recipe.load("sdxl_lora", world)
    found = plan_data.scan(chosen, NoProgress(), seconds=0)
    assert found.sizes.total() == 1
    assert found.share is not None
    assert 0 < found.share < 0.5
    assert found.pairs(None) == round(1 / found.share)
    assert found.pairs(2) == 2
    limited = recipe.load("sdxl_lora", [*world, "data.limit=1"])
    assert plan_data.scan(limited, NoProgress(), seconds=0).pairs(limited.data.limit) == 1


def test_sizes_and_what_is_left_out_are_those_of_the_cache(tmp_path, world) -> None:
    """Pictures of several shapes, one of them too small and one that is none."""
    shapes = [((64, 64), (64, 64)), ((128, 64), (128, 64)), ((16, 16), (64, 64)), ((64, 128), (64, 128))]
    table = pq.read_table(save_random_pairs(tmp_path / "pairs.parquet", 4, shapes=shapes))
    broken = table.slice(0, 1).set_column(
        table.schema.get_field_index("jpg_0"), "jpg_0", pa.array([b"no picture"], table.schema.field("jpg_0").type)
    )
    pq.write_table(pa.concat_tables([table, broken]), tmp_path / "pairs.parquet")
    chosen = recipe.load(
        "sdxl_lora",
        [*world, f"data.path={tmp_path}", "data.heldout_fraction=0.0", "data.aspect=buckets",
         "data.bucket_step_pixels=16", "data.small_images=drop"],
    )  # fmt: skip
    found = plan_data.scan(chosen, NoProgress())
    pairs = fill(
        parts.source(chosen, "train"), parts.family(chosen, torch.device("cpu")), tmp_path, parts.framing(chosen)
    )
    assert found.report.dropped == pairs.report.dropped == {"picture too small": 1, "undecodable image": 1}
    assert found.sizes == pairs.sizes()
    assert len(found.sizes) == 3


def test_pictures_are_not_decoded(world, monkeypatch) -> None:
    monkeypatch.setattr("lora_dpo.data.screening.decode", lambda *_: pytest.fail("a picture was decoded"))
    assert plan_data.scan(recipe.load("sdxl_lora", world), NoProgress()).pairs(None) > 0


def test_without_data_there_is_the_memory_still(world, capsys) -> None:
    """Offline, with neither the weights nor the data of a shipped recipe."""
    code, out, _ = run(capsys, "plan", "sd15_lora", "--gpu", "24GB")
    assert code == 0
    assert "unknown: there are no data" in out
    assert "taken for Stable Diffusion 1.x" in out
    assert "fits       24.00 GiB: yes" in out
    code, out, _ = run(capsys, "plan", "sdxl_lora", *world, "data.path=/nowhere", "--gpu", "0.5GB", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["pairs"], document["epochs"], document["fits"]) == (None, None, False)
    assert "lacking" in text(document)


def test_other_mistakes_of_a_recipe_are_told(capsys) -> None:
    code, _, error = run(capsys, "plan", "sdxl_lora", "train.stepz=1")
    assert code == 2
    assert "stepz" in error
    assert "data.path" in error


@pytest.mark.parametrize(
    ("written", "size"),
    [("24GB", 24 * GIB), ("24", 24 * GIB), ("8.5 GiB", int(8.5 * GIB)), ("11264MiB", 11 * GIB), ("12g", 12 * GIB)],
)
def test_a_cards_memory_is_read_as_its_maker_writes_it(written, size) -> None:
    assert plan.gpu_bytes(written) == size


@pytest.mark.parametrize("written", ["", "big", "-1GB", "0", "24KB", "24 GB RAM"])
def test_a_size_that_is_none_is_refused(written) -> None:
    with pytest.raises(UserError, match="a card's memory"):
        plan.gpu_bytes(written)


def test_a_plan_for_a_cpu_has_no_allowance(world) -> None:
    document = plan.run(recipe.load("sdxl_lora", [*world, "train.device=cpu"]), has_data=False, quiet=True)
    assert document["device"] == "cpu"
    assert document["allowance_gib"] == 0
    assert document["fits"] is None
    assert "CUDA" not in text(document)
