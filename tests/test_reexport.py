"""`lora-dpo export` on a small run: every shape of the adapter is what it says, in stock diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lora_dpo import build, cli, export, recipe, reexport, sources, updates
from lora_dpo.errors import UserError
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl
from tests.test_end_to_end import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "stable_diffusion": StableDiffusionPipeline}


@pytest.fixture(scope="module", params=["sdxl", "stable_diffusion"])
def run(request, tmp_path_factory) -> Path:
    """A finished run of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp(request.param)
    (save_random_sdxl if request.param == "sdxl" else save_random_sd)(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 24, ties=2)
    (folder / "small.toml").write_text(RECIPE.format(family=request.param, cache=folder / "cache"))
    build.run(recipe.load(str(folder / "small.toml"), ["evaluate.prompts=0"]), folder / "run", quiet=True)
    return folder / "run"


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def picture(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images


def stock(run: Path, lora: Path | None = None, base: Path | None = None):
    kind = PIPELINES[recipe.load(str(run / "recipe.toml")).base.family]
    pipeline = kind.from_pretrained(base or run.parent / "base", local_files_only=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipeline


def test_resized_it_states_what_is_lost(run, tmp_path, capsys):
    assert command("export", run, "--rank", "2", "--out", tmp_path / "two", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    whole = sources.open_source(run / "adapter").updates
    two = sources.open_source(tmp_path / "two")
    found, header = two.updates, two.header
    assert {update.rank for update in found.values()} == {2}
    lost = sum((found[m].dense() - whole[m].dense()).square().sum().item() for m in whole)
    total = sum(update.dense().square().sum().item() for update in whole.values())
    assert result["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert 0.01 < result["error"] < 1
    assert 0 < result["resizing_effect"] < 1
    assert json.loads(header["lora_dpo_export"])["rank"] == 2
    assert header["base_unet"]
    # Both layouts are one adapter.
    pictures = [
        picture(stock(run, tmp_path / "two" / file)) for file in (export.FILE, "kohya/two.safetensors")
    ]  # fmt: skip
    torch.testing.assert_close(pictures[0], pictures[1], rtol=0, atol=1e-4)
    assert (pictures[0] - picture(stock(run))).abs().max() > 1e-3


def test_merged_the_pipeline_needs_no_adapter(run, tmp_path):
    assert command("export", run, "--merge", "--out", tmp_path / "merged") == 0
    merged = picture(stock(run, base=tmp_path / "merged"))
    adapted = picture(stock(run, run / "adapter" / export.FILE))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (merged - picture(stock(run))).abs().max() > 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_checkpoint(run, tmp_path):
    assert command("export", run, "--step", "2", "--out", tmp_path / "early") == 0
    assert command("export", run, "--step", "4", "--out", tmp_path / "late") == 0
    early, late, final = (
        load_file(path / export.FILE) for path in (tmp_path / "early", tmp_path / "late", run / "adapter")
    )
    assert late.keys() == final.keys()
    assert all(torch.allclose(late[name], final[name], rtol=1e-6, atol=0) for name in final)
    assert any(not torch.equal(early[name], final[name]) for name in final)


@pytest.mark.parametrize("option", ["train.ema_decay=0.5", "train.optimizer=schedule_free_adamw"])
def test_a_checkpoint_of_a_run_with_an_average_is_the_average(run, tmp_path, option):
    recipe_file = run.parent / "small.toml"
    options = ["evaluate.prompts=0", "evaluate.implicit_pairs=0", option]
    build.run(recipe.load(str(recipe_file), options), tmp_path / "run", quiet=True)
    assert command("export", tmp_path / "run", "--step", "4", "--out", tmp_path / "four") == 0
    four, final = (load_file(path / export.FILE) for path in (tmp_path / "four", tmp_path / "run" / "adapter"))
    assert all(torch.allclose(four[name], final[name], rtol=1e-6, atol=0) for name in final)
    last = load_file(run / "adapter" / export.FILE)  # the same run without an average
    assert any(not torch.allclose(last[name], final[name], rtol=1e-3) for name in final if ".lora_B." in name)


def test_the_mean_of_two(run, tmp_path):
    assert command("export", run, "--step", "2", "--out", tmp_path / "early") == 0
    weights = ["--weight", "0.25", "--weight", "0.75"]
    assert command("export", tmp_path / "early", run, *weights, "--rank", "8", "--out", tmp_path / "mean") == 0
    early, final, mean = (
        sources.open_source(path).updates for path in (tmp_path / "early", run / "adapter", tmp_path / "mean")
    )
    for module, update in mean.items():
        expected = 0.25 * early[module].dense() + 0.75 * final[module].dense()
        torch.testing.assert_close(update.dense(), expected, rtol=1e-4, atol=1e-7)


def test_half_precision_files_are_half_as_large(run, tmp_path):
    assert command("export", run, "--dtype", "float16", "--out", tmp_path / "half") == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / export.FILE).values()} == {torch.float16}


def test_a_foreign_adapter_with_its_base(run, tmp_path):
    """A file without our header: the base is named on the command line."""
    chosen = recipe.load(str(run / "recipe.toml")).base
    save_file(load_file(run / "adapter" / export.FILE), tmp_path / "foreign.safetensors")
    assert command("export", tmp_path / "foreign.safetensors", "--out", tmp_path / "no") == 2
    base = ["--base", chosen.model, "--family", chosen.family]
    assert command("export", tmp_path / "foreign.safetensors", *base, "--out", tmp_path / "yes") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "no checkpoint of step 3"),
        (["--merge", "--rank", "2"], "no rank"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--weight", "1", "--weight", "2"], "2 weights for 1"),
    ],
)
def test_wrong_options(run, tmp_path, capsys, arguments, message):
    assert command("export", run, "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert command("export", run, "--merge", "--out", tmp_path) == 2
    assert "there is something already" in capsys.readouterr().err
    assert command("export", run, "--out", tmp_path) == 0
    assert command("export", run, "--out", tmp_path) == 2
    assert "there is a file already" in capsys.readouterr().err
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_run_that_is_not_finished(run, tmp_path, capsys):
    half = shutil.copytree(run, tmp_path / "half")
    (half / "result.json").unlink()
    assert command("export", half, "--out", tmp_path / "out") == 2
    assert "not finished" in capsys.readouterr().err


def test_a_failed_verification_leaves_nothing(run, tmp_path, monkeypatch):
    right = updates.applied
    wrong = lambda denoiser, found: right(denoiser, updates.average([found], [2.0]))  # noqa: E731
    monkeypatch.setattr(updates, "applied", wrong)
    assert command("export", run, "--out", tmp_path / "out") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert command("export", run, "--merge", "--out", tmp_path / "merged") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_adapters_of_two_bases():
    def source(unet: str) -> sources.Source:
        return sources.Source(Path(unet), {}, {"base_unet": unet})

    with pytest.raises(UserError, match="different base models"):
        reexport.base_of([source("a"), source("b")], None, None, None)


def test_the_documents_commands(run, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text("utf-8")
    commands = [line.split() for line in text.splitlines() if line.startswith("lora-dpo export ")]
    assert len(commands) >= 6
    monkeypatch.chdir(tmp_path)
    for name in ("sdxl", "other"):
        shutil.copytree(run, tmp_path / "runs" / name)
    for words in commands:
        # The small run has 4 steps of rank 4.
        words = [{"1500": "2", "8": "2", "16": "3", "float16": "float32"}.get(word, word) for word in words[1:]]
        assert command(*words) == 0, words
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {
        words[words.index("--out") + 1].removeprefix("exports/") for words in commands
    }
