"""benchmarks/step.py: what it compares does the same work, and what it prints is whole."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[1]
MODULES = ("step", "step_modes", "published", "true_size")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("step")
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(benchmark, monkeypatch, capsys, *arguments: str) -> tuple[str, dict]:
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    benchmark.main()
    shown = capsys.readouterr().out
    return shown, json.loads(shown.splitlines()[-1])


def test_a_whole_run(benchmark, monkeypatch, capsys, tmp_path):
    options = ("--case", "tinyworld", "--repeats", "1", "--warmup", "1", "--pairs", "2", "--profile", "--json")
    shown, figures = run(benchmark, monkeypatch, capsys, *options, "--work", str(tmp_path), "--device", "cpu")
    assert {"device", "versions", "commit", "repeats", "median_seconds"} <= set(figures)
    modes = {"published", "first", "cached", "first, checkpointing", "cached, checkpointing", "bare", "encoding"}
    assert set(figures["median_seconds"]) == modes
    assert all(seconds > 0 and math.isfinite(seconds) for seconds in figures["median_seconds"].values())
    for name in ("ratio_first_epoch", "ratio_cached", "ratio_to_bare"):
        assert figures[name] > 0
        assert math.isfinite(figures[name])
    medians = figures["median_seconds"]
    assert figures["ratio_first_epoch"] == medians["published"] / medians["first"]
    assert figures["ratio_cached"] == medians["published"] / medians["cached"]
    # A pair is two images, and the reference's pass is as large as the policy's.
    images = {"published": 4, "first": 4, "cached": 2, "bare": 2, "encoding": 0}
    images |= {"first, checkpointing": 4, "cached, checkpointing": 2}
    assert figures["images_forward"] == images
    parts = figures["profile"]
    assert {"VAE", "text encoders", "reference", "policy forward", "backward"} <= set(parts["published"])
    assert {"reference", "policy forward", "backward", "optimizer"} <= set(parts["first"])
    assert "reference" not in parts["cached"]
    assert not {"VAE", "text encoders"} & set(parts["first"])
    assert all(f"{name} " in shown for name in modes)


def test_settings_of_torch_beside_the_step_as_it_is(benchmark, monkeypatch, capsys, tmp_path):
    options = ("--case", "tinyworld", "--repeats", "1", "--warmup", "0", "--pairs", "1", "--json", "--device", "cpu")
    names = ["channels_last", "fused AdamW", "foreach AdamW", "no autocast"]
    _, figures = run(benchmark, monkeypatch, capsys, *options, "--work", str(tmp_path), "--variants", *names)
    assert set(figures["speedup"]) == {"cached", *names}
    assert figures["speedup"]["cached"] == 1
    assert set(figures["images_forward"].values()) == {2}


def test_the_published_loop_computes_our_loss_and_gradient(benchmark, tmp_path):
    ours = benchmark.open_ours("tinyworld", tmp_path, 1, None, torch.device("cpu"))
    loop = benchmark.published(ours, benchmark.share(ours.family.denoiser), torch.float32)
    method = ours.method(stored=False)
    own = ours.adapters.parameters()
    theirs = dict(loop.unet.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in own.items():
        module, _, end = name.rpartition(".lora_")
        other = theirs[f"{module}.lora_{end[0]}.default.weight"]
        assert other.shape == parameter.shape
        if end[0] == "B":
            parameter.data = torch.randn(parameter.shape, generator=generator) / 100
        other.data = parameter.data.clone()
    batch = next(method.batches(0))
    (part,) = batch.parts(1)
    images = part.images("winner", "loser")
    conditioning = images.conditioning
    added = {"time_ids": conditioning["time_ids"], "text_embeds": conditioning["pooled"]}
    loss, _ = loop.loss(images.x_0, images.noise, images.t, conditioning["prompt_embeds"], added)
    loss.backward()
    found = method.backward(part)
    assert loss.item() != pytest.approx(math.log(2), rel=1e-3)
    assert loss.item() == pytest.approx(found.loss.item(), rel=1e-4)
    for name, parameter in own.items():
        module, _, end = name.rpartition(".lora_")
        gradient = theirs[f"{module}.lora_{end[0]}.default.weight"].grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()))
