"""The grid shows what it says, the curves what was logged, and the card's numbers, snippet and front matter hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lora_dpo.data import SourceReport
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.evaluation.win_rate import compare, compare_details
from lora_dpo.figures import before_after, curves, read_metrics
from lora_dpo.report import model_card

GROUNDS = [(250, 225, 190), (190, 225, 250), (200, 240, 205), (245, 205, 215)]


def drawn(n: int, *, height: int = 64, width: int = 64, ink: tuple[int, int, int] = (30, 90, 200)) -> torch.Tensor:
    """Discs on coloured grounds: [n, 3, height, width]."""
    pictures = []
    for index in range(n):
        picture = Image.new("RGB", (width, height), GROUNDS[index % len(GROUNDS)])
        ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=ink)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    return torch.stack(pictures)


def where(page: Image.Image, ink: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels that have about this colour."""
    return np.argwhere((np.abs(np.asarray(page).astype(int) - ink) < 12).all(axis=-1))


def test_grid_has_base_above_adapted_for_every_prompt(tmp_path):
    red, blue = (220, 40, 40), (30, 90, 200)
    path = before_after(drawn(2, ink=red), drawn(2, ink=blue), ["a red disc", "a blue disc"], tmp_path / "grid.png")
    with Image.open(path) as page:
        page.load()
    assert page.width == 1800
    above, below = where(page, red), where(page, blue)
    assert above[:, 0].max() < below[:, 0].min()
    assert abs(above[:, 1].mean() - below[:, 1].mean()) < 8
    # Two columns: the ink's columns fall apart in two groups.
    columns = np.unique(above[:, 1])
    assert (np.diff(columns) > 50).sum() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 64), (5, 64, 64), (8, 96, 64), (3, 1024, 768)])
def test_grid_of_any_number_and_shape(tmp_path, n, height, width):
    prompts = [f"prompt {i}" for i in range(n)]
    base = drawn(n, height=height, width=width)
    with Image.open(before_after(base, base, prompts, tmp_path / "grid.png", subtitle="same seeds")) as page:
        assert page.width == 1800
        # Everything ends inside the page: its border is white.
        pixels = np.asarray(page)
        border = np.concatenate([pixels[:16].ravel(), pixels[-16:].ravel(), pixels[:, :12].ravel()])
        assert border.min() == 255


def test_grid_shows_the_first_image_of_the_first_distinct_prompts(tmp_path):
    base = torch.zeros(6, 3, 64, 64)
    marks = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
    for image, mark in zip(base, marks, strict=True):
        image[:] = torch.tensor(mark).view(3, 1, 1) / 255
    prompts = ["a", "a", "b", "b", "c", "c"]
    with Image.open(before_after(base, base, prompts, tmp_path / "grid.png", n=2)) as page:
        seen = {mark for mark in marks if len(where(page, mark)) > 1000}
    assert seen == {marks[0], marks[2]}


def test_grid_survives_any_caption(tmp_path):
    long = "x" * 400
    strange = "ein sehr langer Satz " * 30
    base = drawn(3)
    before_after(base, base, [long, strange, ""], tmp_path / "grid.png", title="", n=3)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_grid_needs_matching_images(tmp_path):
    with pytest.raises(LoraDpoError, match="2 base and 2 adapted images for 1 prompts"):
        before_after(drawn(2), drawn(2), ["a"], tmp_path / "grid.png")
    with pytest.raises(LoraDpoError, match="for 0 prompts"):
        before_after(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), [], tmp_path / "grid.png")


def metrics(path, steps: int, *, pairwise: bool = True):
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 0.7 - 0.002 * step, "learning_rate": 1e-4, "error_winner": 0.05}
        if pairwise:
            margin = 0.01 * step + rng.normal()
            line |= {"implicit_accuracy": 0.6, "margin": margin, "error_loser": 0.06}
            line |= {"ref_error_winner": 0.051, "ref_error_loser": 0.059}
        lines.append(json.dumps(line))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def figure(monkeypatch):
    """The matplotlib figure that `curves` draws, which it closes itself."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (kept.append(self), save(self, *args, **kw))[1])
    return kept


def test_curves_of_dpo(tmp_path, figure):
    path = curves(metrics(tmp_path / "metrics.jsonl", 80), tmp_path / "curves.png", title="run")
    with Image.open(path) as image:
        assert image.width == 1800
    axes = {axis.get_title("left"): axis for axis in figure[0].axes}
    assert list(axes) == [
        "Loss", "Implicit accuracy", "Margin", "Error against the reference", "Denoising error", "Learning rate",
    ]  # fmt: skip
    assert all(axis.get_ylabel() for axis in axes.values())
    assert axes["Learning rate"].get_xlabel() == "optimizer step"
    level, raw, smooth = axes["Loss"].get_lines()
    assert level.get_ydata()[0] == math.log(2)
    assert raw.get_ydata()[79] == pytest.approx(0.54)
    # A straight line stays one, away from the ends.
    assert smooth.get_ydata()[40] == pytest.approx(raw.get_ydata()[40])
    difference = axes["Error against the reference"].get_lines()[-1]
    assert difference.get_ydata()[5] == pytest.approx(0.001)
    noisy, calm = axes["Margin"].get_lines()[1:]
    assert np.std(np.diff(calm.get_ydata())) < 0.3 * np.std(np.diff(noisy.get_ydata()))


@pytest.mark.parametrize("steps", [1, 2, 15])
def test_curves_of_short_runs_and_sft(tmp_path, figure, steps):
    curves(metrics(tmp_path / "metrics.jsonl", steps, pairwise=False), tmp_path / "curves.png")
    shown = [axis for axis in figure[0].axes if axis.axison]
    assert [axis.get_title("left") for axis in shown] == ["Loss", "Learning rate"]
    assert shown[0].get_ylabel() == "mean squared error"
    assert list(shown[0].get_lines()[0].get_xdata()) == list(range(1, steps + 1))


def test_metrics_of_a_killed_run(tmp_path):
    path = metrics(tmp_path / "metrics.jsonl", 3)
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n[1]\n', r"metrics.jsonl:2: not a line of metrics"),
        ('{"loss": 1}\n', r"metrics.jsonl:1: not a line"),
        ("", "no metrics yet"),
        ('{"step": 1}\n', "no loss or learning rate"),
    ],
)
def test_broken_metrics_say_where(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        curves(path, tmp_path / "curves.png")
    with pytest.raises(UserError, match="can't be read"):
        curves(tmp_path / "none.jsonl", tmp_path / "curves.png")


def run(gain: float = 0.5) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = rng.normal(size=64)
    adapted = base + gain + 0.5 * rng.normal(size=64)
    prompts = [f"p{i}" for i in range(64)]
    parts_b = {"colour | hue": base, "count": base}
    parts_a = {"colour | hue": adapted, "count": base - 0.3}
    return {
        "name": "my run", "adapter": "adapter/pytorch_lora_weights.safetensors", "steps": 10,
        "pipeline": "StableDiffusionXLPipeline", "example_prompt": 'a "red" star', "scorer": "tinyworld", "samples": 64,
        "pairs": 90,
        "comparison": compare(adapted, base, prompts, seed=0).to_json(),
        "categories": {k: v.to_json() for k, v in compare_details(parts_a, parts_b, prompts, seed=0).items()},
        "implicit": {
            "pairs": 50, "draws": 4, "accuracy": 0.64, "accuracy_ci95": [0.5, 0.76], "margin": 0.2,
            "margin_ci95": [None, None],
        },
        "seconds": 100.0, "train_seconds": 80.0, "peak_memory_gib": 1.5, "device": "cpu", "versions": {"torch": "2.13"},
    }  # fmt: skip


def card(result: dict[str, Any], **changes: Any) -> str:
    options: dict[str, Any] = {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "data_source": "/home/somebody/secret/pairs",
        "data_report": SourceReport(rows=100, kept=90, dropped=Counter({"tie": 8, "undecodable image": 2})),
        "method": {"kind": "dpo", "beta": 2000.0, "timestep_range": (0, 1000), "visits_per_pair": None},
        "settings": {"rank": 16, "learning_rate": 1e-4},
        "sum_form_beta": 0.0152,
        "resolution": 1024,
        "sampling": {"steps": 20, "guidance": 5.0},
    }
    return model_card(result, **(options | changes))


def test_card_has_a_front_matter_that_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    data = ModelCard(card(run(), license="apache-2.0")).data
    assert data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert data.library_name == "diffusers"
    assert data.license == "apache-2.0"
    assert {"text-to-image", "lora", "diffusion-dpo"} <= set(data.tags)


def test_card_tells_numbers_data_and_method():
    result = run()
    text = card(result)
    low, high = result["comparison"]["ci95"]
    assert f"{result['comparison']['win_rate']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "scores higher than its base" in text
    assert "**Worse than the base: count.**" in text
    assert r"colour \| hue" in text
    assert "100 comparisons, of which 90 were used; left out: 8 tie, 2 undecodable image." in text
    assert "0.640 [0.500, 0.760]" in text
    assert "(margin +0.200, 4 draws each)" in text
    assert "| β (mean-reduced errors, factor ½) | 2000 |" in text
    assert "| β of summed errors, β / (2·c·h·w) | 0.0152 |" in text
    assert "| timestep range | 0, 1000 |" in text
    assert "visits per pair" not in text
    assert "secret" not in text
    assert "before_after.png" in text
    assert "curves.png" in text
    assert "before_after.png" not in card(result, grid=None)


def test_card_is_honest_about_no_difference_and_no_scorer():
    result = run(gain=0.02)
    assert "can't be told apart" in card(result)
    assert f"about {result['comparison']['further_prompts']:,} more" in card(result)
    assert "**The adapted model scores lower than its base.**" in card(run(gain=-0.5))
    unscored = {key: value for key, value in run().items() if key not in ("comparison", "categories")} | {
        "implicit": None
    }
    assert "there is no win rate" in card(unscored)


@pytest.mark.parametrize("base", ["stabilityai/stable-diffusion-xl-base-1.0", "tinyworld", "/home/somebody/mine"])
@pytest.mark.parametrize("repo", [None, "me/adapter"])
def test_cards_snippet_is_python(base, repo):
    text = card(run(), base_model=base, repo=repo)
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "somebody" not in text
    assert f'pipe.load_lora_weights("{repo or "adapter"}", weight_name="pytorch_lora_weights.safetensors")' in code
    assert "num_inference_steps=20, guidance_scale=5.0" in code
    assert ("base_model:" in text) == (base != "tinyworld" and not base.startswith("/"))


def test_the_lines_that_load_the_base_know_its_file_revision_and_prediction() -> None:
    file = "/models/sd21.safetensors"
    text = card(run() | {"base_options": {"single_file": True, "prediction_type": "v_prediction"}}, base_model=file)
    assert 'from_single_file("path/to/sd21.safetensors")' in text
    assert "from_config(pipe.scheduler.config, prediction_type='v_prediction')" in text
    assert "from_pretrained" not in text
    pinned = card(run() | {"base_options": {"revision": "fp16"}}, base_model="owner/name")
    assert """from_pretrained("owner/name", revision='fp16')""" in pinned


def test_captions_that_were_cut_are_counted_in_the_card() -> None:
    cut = card(run() | {"data": {"captions": 1200, "captions_cut": 7}})
    assert "7 of 1,200 captions are longer than the text encoder reads" in cut
    assert "longer than" not in card(run() | {"data": {"captions": 1200, "captions_cut": 0}})
