"""One recipe to one adapter, on random models in the true formats: small, but every step is the real one."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from lora_dpo import build, cli, hub, parts, recipe
from lora_dpo import train as training
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.evaluation import samples
from lora_dpo.sampling import sample
from lora_dpo.scorers import Scorer
from lora_dpo.summary import summary
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl

RECIPE = """
name = "small"
[data]
path = "pairs.parquet"
heldout_fraction = 0.3
resolution = 64
[base]
family = "{family}"
model = "base"
[adapter]
rank = 4
alpha = 8
[method]
kind = "dpo"
beta = 500
[train]
steps = 4
batch_pairs = 4
learning_rate = 1e-2
save_every_steps = 2
device = "cpu"
[evaluate]
prompts = 2
seeds_per_prompt = 2
steps = 2
guidance = 3
implicit_pairs = 4
[output]
trackers = ["tensorboard"]
cache_dir = "{cache}"
"""


@pytest.fixture(scope="module", params=["sdxl", "stable_diffusion"])
def world(request, tmp_path_factory) -> Path:
    """A folder with `small.toml`, its base model and its pairs."""
    folder = tmp_path_factory.mktemp(request.param)
    (save_random_sdxl if request.param == "sdxl" else save_random_sd)(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 24, ties=2)
    (folder / "small.toml").write_text(RECIPE.format(family=request.param, cache=folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def finished(world: Path) -> build.Outcome:
    return build.run(recipe.load(str(world / "small.toml")), world / "run", quiet=True)


def test_the_run_directory_holds_what_it_promises(finished: build.Outcome, world: Path) -> None:
    run = finished.run_dir
    names = ["recipe.toml", "metrics.jsonl", "before_after.png", "curves.png", "README.md", "result.json"]
    assert all((run / name).is_file() for name in names)
    assert len(list((run / "samples").glob("*.png"))) == 2 * 4
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert json.loads((run / "result.json").read_text()) == finished.result
    assert recipe.load(str(run / "recipe.toml")) == recipe.load(str(world / "small.toml"))
    assert (run / finished.result["adapter"]).is_file()
    assert finished.result["adapter_kohya"] == "kohya/small.safetensors"
    assert (run / finished.result["adapter_kohya"]).is_file()
    assert "kohya/small.safetensors" in (run / "README.md").read_text("utf-8")
    assert {"win_rate", "win_rate_ci95", "score_base", "score_adapted", "seconds", "peak_memory_gib"} <= set(
        finished.result
    )
    assert finished.result["implicit"]["pairs"] == 4
    assert finished.result["verification"]["effect"] > 100 * finished.result["verification"]["difference"]


def test_stock_diffusers_makes_the_runs_own_pictures_with_the_adapter(finished: build.Outcome) -> None:
    kind = {"StableDiffusionXLPipeline": StableDiffusionXLPipeline, "StableDiffusionPipeline": StableDiffusionPipeline}
    settings = recipe.load(str(finished.run_dir / "recipe.toml"))
    images = []
    family = parts.family(settings, torch.device("cpu"))
    from lora_dpo import checkpoint
    from lora_dpo.adapters import Adapters

    adapters = Adapters.attach(family.denoiser, rank=4, alpha=8.0, seed=0)
    found = checkpoint.latest(finished.run_dir, print)
    assert found is not None
    adapters.load_state_dict(found.adapter())
    stock = kind[finished.result["pipeline"]].from_pretrained(settings.base.model, local_files_only=True)
    stock.load_lora_weights(finished.run_dir / "adapter", adapter_name="mine")
    for pipeline in (family.pipeline(), stock):
        options = {"steps": 3, "guidance": 3.0, "height": 64, "width": 64}
        images.append(sample(pipeline, ["a red ring"], [5], **options))
    stock.disable_lora()
    images.append(sample(stock, ["a red ring"], [5], **options))
    own, reloaded, base = images
    assert torch.allclose(own, reloaded, atol=1e-5)
    assert (own - base).abs().max() > 1e-3


def test_the_saved_samples_are_what_the_adapter_makes(finished: build.Outcome) -> None:
    samples = finished.run_dir / "samples"
    base, adapted = (np.asarray(Image.open(samples / f"0000-{side}.png")) for side in ("base", "adapted"))
    assert base.shape == adapted.shape == (64, 64, 3)
    assert (base != adapted).any()
    assert Image.open(samples / "0000-base.png").text["seed"] == "0"


class Brightness(Scorer):
    """Stands in for a scorer of real pictures."""

    name = "brightness"

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

    def details(self, images, prompts):
        return {"red": images[:, 0].mean(dim=(1, 2)), "never": torch.full((len(images),), torch.nan)}


def test_scores_become_a_win_rate_a_summary_and_a_card(finished: build.Outcome, world, tmp_path, monkeypatch) -> None:
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    monkeypatch.setattr(parts, "scorer", lambda _: Brightness())
    outcome = build.run(recipe.load(str(world / "small.toml"), ["evaluate.guidance=2"]), run, quiet=True)
    result = outcome.result
    low, high = result["win_rate_ci95"]
    assert 0 <= low <= result["win_rate"] <= high <= 1
    pictures = [np.asarray(Image.open(p)).mean() / 255 for p in sorted((run / "samples").glob("*-adapted.png"))]
    assert result["score_adapted"] == pytest.approx(np.mean(pictures), abs=2e-3)
    assert list(result["categories"]) == ["red"]
    text = summary(result, run)
    assert f"{result['win_rate']:.3f} [" in text
    assert f"pipe.load_lora_weights('{run}/adapter')" in text
    card = (run / "README.md").read_text("utf-8")
    assert f"{result['score_adapted']:.3f}" in card


def test_again_it_says_that_it_is_finished(finished: build.Outcome, world: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_execute", lambda *_: pytest.fail("it was executed again"))
    again = build.run(recipe.load(str(world / "small.toml")), finished.run_dir, quiet=True)
    assert again.already
    assert again.result == finished.result
    assert "finished already" in summary(again.result, again.run_dir, already=True)


def test_killed_and_resumed_it_ends_with_the_same_adapter(
    finished: build.Outcome, world: Path, tmp_path, monkeypatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_args, **_kwargs) -> None:
        raise Killed

    settings = recipe.load(str(world / "small.toml"))
    step = torch.optim.AdamW.step
    calls = []

    def dying_step(self, *args, **kwargs):
        calls.append(1)
        return die() if len(calls) == 4 else step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dying_step)
        with pytest.raises(Killed):
            build.run(settings, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = build.run(settings, tmp_path / "run", quiet=True)
    one, two = (load_file(o.run_dir / o.result["adapter"]) for o in (finished, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.result["implicit"] == finished.result["implicit"]


def test_another_recipe_is_refused_and_the_run_is_left_alone(finished: build.Outcome, world: Path) -> None:
    before = (finished.run_dir / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"another recipe: adapter\.rank: 4 → 8; method\.beta: 500\.0 → 1\.0"):
        build.run(recipe.load(str(world / "small.toml"), ["adapter.rank=8", "method.beta=1"]), finished.run_dir)
    assert (finished.run_dir / "result.json").read_bytes() == before


def test_a_run_that_failed_before_its_first_step_takes_the_mended_recipe(world: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    overrides = ["train.steps=1", "evaluate.prompts=0", "evaluate.implicit_pairs=0"]
    broken = recipe.load(str(world / "small.toml"), [*overrides, f"data.path={tmp_path / 'broken.parquet'}"])
    with pytest.raises(UserError, match="parquet"):
        build.run(broken, tmp_path / "run", quiet=True)
    mended = recipe.load(str(world / "small.toml"), overrides)
    assert build.run(mended, tmp_path / "run", quiet=True).result["steps"] == 1


def test_other_evaluation_keys_evaluate_anew_without_training(finished: build.Outcome, world: Path, tmp_path) -> None:
    run = shutil.copytree(finished.run_dir, tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_bytes()
    settings = recipe.load(str(world / "small.toml"), ["evaluate.prompts=0", "evaluate.implicit_pairs=0"])
    again = build.run(settings, run, quiet=True)
    assert (again.already, again.result["implicit"]) == (False, None)
    assert "samples" not in again.result
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_folder_with_other_things_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        build.run(recipe.load(str(world / "small.toml")), tmp_path)
    with pytest.raises(UserError, match="this is a file"):
        build.run(recipe.load(str(world / "small.toml")), tmp_path / "thesis.tex")


def test_sft_with_its_own_prompts_and_a_jsonl_free_of_scores(world: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a star\n\na star\na ring\n")
    arguments = ["method.kind=sft", "train.steps=2", f"evaluate.prompts_file={tmp_path / 'prompts.txt'}"]
    arguments += ["evaluate.every_steps=2", "evaluate.every_steps_pairs=3"]
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["train", str(world / "small.toml"), *arguments, "--run-dir", str(tmp_path / "run"), "--json", "--quiet"]
        )
    assert caught.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 4
    assert document["win_rate"] is None
    assert document["run_dir"] == str(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["heldout_accuracy" in line for line in lines] == [False, True]
    assert 0 <= lines[1]["heldout_accuracy"] <= 1


def test_pushing_without_a_token_fails_before_any_work(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="token"):
        build.run(recipe.load(str(world / "small.toml")), tmp_path / "run", push_to_hub="me/mine")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no name of a repository"):
        build.run(recipe.load(str(world / "small.toml")), tmp_path / "run", push_to_hub="a/b/c")


def test_a_failed_push_keeps_the_run(finished: build.Outcome, world: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "hf_x")
    with pytest.raises(LoraDpoError, match=r"finished in .* pushing it to me/mine failed"):
        build.run(recipe.load(str(world / "small.toml")), finished.run_dir, push_to_hub="me/mine")
    assert (finished.run_dir / "result.json").is_file()


def test_no_held_out_pairs_is_a_clear_error(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no held-out pairs"):
        build.run(recipe.load(str(world / "small.toml"), ["data.heldout_fraction=0.0"]), tmp_path / "run", quiet=True)


def test_a_device_that_is_not_there(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no cuda device"):
        build.run(recipe.load(str(world / "small.toml"), ["train.device=cuda"]), tmp_path / "run")


def test_interrupted_training_exits_with_130(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(**_):
        raise training.Interrupted("interrupted; step 2 of 4 is saved")

    monkeypatch.setattr(build, "train", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(world / "small.toml"), "--run-dir", str(tmp_path / "run"), "--quiet"])
    assert caught.value.code == 130
    assert "step 2 of 4 is saved" in capsys.readouterr().err


def test_the_app_makes_the_runs_pictures_and_scales_the_adapter(finished: build.Outcome) -> None:
    from app.runs import Studio, finished_runs

    assert finished_runs(finished.run_dir.parent) == [str(finished.run_dir)]
    studio, run = Studio(), str(finished.run_dir)
    saved = finished.run_dir / "samples"
    prompt = Image.open(saved / "0000-base.png").text["prompt"]
    base, adapted = (np.asarray(p, int) for p in studio.pictures(run, prompt, 0, 2, 3.0, 1.0))
    for picture, name in ((base, "0000-base.png"), (adapted, "0000-adapted.png")):
        assert abs(picture - np.asarray(Image.open(saved / name), int)).max() <= 1
    again, unchanged = (np.asarray(p, int) for p in studio.pictures(run, prompt, 0, 2, 3.0, 0.0))
    assert (again == base).all()
    assert (unchanged == base).all()
    with pytest.raises(UserError, match="no finished run"):
        studio.pictures(str(finished.run_dir / "samples"), prompt, 0, 2, 3.0, 1.0)


def test_the_app_answers_over_http(finished: build.Outcome) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_dpo", "app", "--run", str(finished.run_dir), "--port", str(port)],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, process.stdout and process.stdout.read()
            with contextlib.suppress(OSError), urllib.request.urlopen(url) as page:
                assert b"lora-dpo" in page.read()
                break
            time.sleep(0.2)
        body = json.dumps({"data": [str(finished.run_dir), "a red ring", 3, 2, 3.0, 1.0]}).encode()
        request = urllib.request.Request(f"{url}/gradio_api/call/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{url}/gradio_api/call/generate/{event}") as answer:
            text = answer.read().decode()
        base, adapted = json.loads(text.split("event: complete\ndata: ")[1].splitlines()[0])
        pictures = []
        for image in (base, adapted):
            with urllib.request.urlopen(image["url"]) as answer:
                pictures.append(np.asarray(Image.open(io.BytesIO(answer.read()))))
        assert pictures[0].shape[:2] == (64, 64)
        assert (pictures[0] != pictures[1]).any()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in (0, 130)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n two \none\n", "utf-8")
    assert samples.read_prompts(path) == ["one", "two", "one"]
    assert samples.first_distinct(samples.read_prompts(path), 5) == ["one", "two"]
    for content in (b"\n \n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError):
            samples.read_prompts(path)
