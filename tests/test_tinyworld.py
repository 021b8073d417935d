"""The embedded world: what is shipped is what was released, and what made it does what it says."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from lora_dpo import tinyworld
from lora_dpo.sampling import sample
from lora_dpo.tinyworld import model, preferences, pretrain, scenes, taste
from lora_dpo.tinyworld.verifier import Measurement, measure

GOLDEN = Path(__file__).parent / "golden" / "tinyworld.png"
GOLDEN_CAPTIONS = ["a large red heart", "two blue stars on a cream background", "a green cross above a pink circle"]


def test_weights_and_preferences_are_as_released() -> None:
    assert tinyworld.changed_files() == []


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    loaded = StableDiffusionXLPipeline.from_pretrained(
        tinyworld.base_path(), dtype=torch.float32, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_base_is_a_stock_sdxl_pipeline_of_at_most_25_mb(pipe: StableDiffusionXLPipeline) -> None:
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert type(pipe.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert pipe.unet.config["addition_embed_type"] == "text_time"
    assert sum(f.stat().st_size for f in tinyworld.base_path().rglob("*") if f.is_file()) <= 25e6


def test_golden_samples(pipe: StableDiffusionXLPipeline) -> None:
    images = sample(pipe, GOLDEN_CAPTIONS, [1, 2, 3], steps=6, guidance=5.0, height=64, width=64)
    strip = torch.cat(list(images), -1).permute(1, 2, 0).numpy()
    golden = np.asarray(Image.open(GOLDEN).convert("RGB")) / 255
    assert np.abs(strip - golden).mean() < 0.01  # rounding differs between processors; pictures don't


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return pq.read_table(tinyworld.preferences_path()).to_pylist()


def test_the_preference_set_is_large_noisy_and_split_by_prompt(rows: list[dict[str, object]]) -> None:
    assert len(rows) >= 6000
    prompts = {s: {r["caption"] for r in rows if r["split"] == s} for s in ("train", "heldout")}
    assert len(prompts["heldout"]) >= 128
    assert not prompts["train"] & prompts["heldout"]
    ties = np.mean([r["label_0"] == 0.5 for r in rows])
    assert 0.03 < ties < 0.25
    judged = [r for r in rows if r["label_0"] != 0.5 and r["label_0_clean"] != 0.5]
    wrong = np.mean([r["label_0"] != r["label_0_clean"] for r in judged])
    assert 0.05 < wrong < 0.3  # Bradley-Terry noise and people's leanings
    assert len({r["user_id"] for r in rows}) == taste.ANNOTATORS
    assert all(r["label_0"] + r["label_1"] == 1 for r in rows)


def test_shipped_labels_follow_from_the_shipped_pictures(rows: list[dict[str, object]]) -> None:
    chosen = rows[:: len(rows) // 40]
    captions = [str(r["caption"]) for r in chosen]
    first, second = (
        measure(np.stack([np.asarray(Image.open(io.BytesIO(r[c])).convert("RGB")) for r in chosen]), captions)  # type: ignore[arg-type]
        for c in ("jpg_0", "jpg_1")
    )
    for row, a, b in zip(chosen, first, second, strict=True):
        gap = taste.utility(a) - taste.utility(b)
        assert row["label_0_clean"] == (0.5 if gap == 0 else float(gap > 0))


def test_held_out_prompts_are_the_plan_s() -> None:
    plan = preferences.Plan()
    assert len(set(preferences.prompts(plan))) == plan.train_prompts + plan.heldout_prompts


def measurement(shading: float = 0.0, size: float = 0.5, vividness: float = 0.5, right: bool = True) -> Measurement:
    return Measurement({"shape": right, "colour": True}, (), "white", "flat", shading, size, vividness, 1.0)


def test_utility_rises_with_each_of_its_parts() -> None:
    base = taste.utility(measurement())
    assert taste.utility(measurement(shading=1.0)) == pytest.approx(base + taste.SHADING)
    assert taste.utility(measurement(size=1.0)) > base
    assert taste.utility(measurement(vividness=1.0)) > base
    assert taste.utility(measurement(right=False)) == pytest.approx(base - taste.STRICT - taste.MEAN / 2)
    assert taste.utility(measurement(size=float("nan"))) < base  # an empty picture has no size, and isn't preferred


def test_judgements_are_bradley_terry_with_ties_and_don_t_depend_on_order_of_calls() -> None:
    good, bad = measurement(shading=0.5), measurement()
    labels = [taste.label(1, str(k), good, bad)[0] for k in range(2000)]
    assert labels[7] == taste.label(1, "7", good, bad)[0]
    seen = np.mean([x for x in labels if x != 0.5])
    assert seen == pytest.approx(1 / (1 + np.exp(-taste.SHARPNESS * 0.25)), abs=0.06)
    assert np.mean([x == 0.5 for x in labels]) > 0.02
    assert {taste.label(1, str(k), good, bad)[1] for k in range(20)} == {1.0}


def test_every_word_is_one_token() -> None:
    words = model.tokenizer()
    assert {w for w in scenes.WORDS if len(words.tokenize(w)) != 1} == set()
    longest = "three striped"
    assert len(words(f"a {longest}").input_ids) == 5
    rng = np.random.default_rng(0)
    captions = [scenes.write(scenes.draw_facts(rng)) for _ in range(500)]
    assert max(len(words(c).input_ids) for c in captions) <= model.MAX_TOKENS


def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    vae = model.autoencoder().eval()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 64, 64, 3), np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        picture = vae.decode(before.mean).sample
        pretrain._whiten(vae, images)
        after = vae.encode(pixels).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
        ratio = before.std / after.std  # the posterior's width is scaled as the mean is
        assert torch.allclose(ratio, ratio.mean((0, 2, 3), keepdim=True).expand_as(ratio), rtol=1e-3)


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def fit(name: str, stop_at: int | None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        layer = nn.Linear(3, 2)
        calls = itertools.count()

        def loss(step: int) -> torch.Tensor:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (layer(x) - 1).square().mean()

        def run() -> None:
            pretrain._fit(layer, loss, lambda _: 0.1, 9, tmp_path / name, lambda _: None, name=name, decay=0.9,
                          betas=(0.9, 0.99), every=2)  # fmt: skip

        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                run()
            return fit(name, None)
        run()
        return [p.detach().clone() for p in layer.parameters()]

    whole, resumed = fit("whole", None), fit("resumed", 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
