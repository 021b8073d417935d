"""A base in 8 or 4 bits: what its layers compute, what they keep, and a whole run on it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn
from torch.nn import functional

from lora_dpo import build, cli, recipe
from lora_dpo.errors import UserError
from lora_dpo.families import quantized
from lora_dpo.families.quantized import QuantizedLinear
from lora_dpo.families.sdxl import SDXL
from tests.support.models import save_random_pairs, save_random_sdxl
from tests.test_end_to_end import RECIPE

CPU = torch.device("cpu")
KINDS = ["int8", "nf4"]
# The error of a normal weight's rounding, relative to its norm: to 1/127 of a row's largest, to 16 levels of a block's.
ERRORS = {"int8": (0.002, 0.012), "nf4": (0.05, 0.11)}
BYTES = {"int8": 1.0, "nf4": 0.5}

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def linear(out: int = 256, into: int = 128, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Linear(into, out, bias=bias)
        nn.init.normal_(made.weight, std=0.02)
        return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_with_the_restored_weight_in_both_directions(kind, dtype) -> None:
    layer = QuantizedLinear(linear(dtype=dtype), kind, CPU)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = torch.autograd.grad(layer(x).float().square().sum(), x)[0]
    plain = functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)
    assert torch.equal(found, torch.autograd.grad(plain.float().square().sum(), x)[0])
    with torch.no_grad():
        assert torch.equal(layer(x), plain)  # the reference pass computes what the policy pass does


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_and_the_bytes(kind) -> None:
    plain = linear(out=1024, into=512)
    layer = QuantizedLinear(plain, kind, CPU)
    error = ((layer.weight - plain.weight).norm() / plain.weight.norm()).item()
    assert ERRORS[kind][0] < error < ERRORS[kind][1]
    assert layer.get_buffer("packed").numel() == plain.weight.numel() * BYTES[kind]
    assert "weight" not in dict(layer.named_parameters())


def test_int8_rounds_to_half_a_step_at_most() -> None:
    plain = linear()
    layer = QuantizedLinear(plain, "int8", CPU)
    step = plain.weight.abs().amax(dim=1, keepdim=True) / 127
    # The kernel reads the weight as float16, which rounds by 2**-11 of it.
    assert ((layer.weight - plain.weight).abs() <= 0.5 * step + 2**-10 * plain.weight.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_restored_weight_is_kept_for_the_backward_pass(kind) -> None:
    kept: list[int] = []
    x = torch.randn(3, 128).requires_grad_()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        QuantizedLinear(linear(), kind, CPU)(x)
        assert kept == []
        functional.linear(x, linear().weight.detach())
    assert kept == [256 * 128]  # what a plain layer keeps, with or without a quantised weight behind it


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_computes_in_bfloat16(kind) -> None:
    layer = QuantizedLinear(linear(), kind, CPU)
    x = torch.randn(3, 128).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_random_sdxl(tmp_path_factory.mktemp("quantized") / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layers_of_attention_blocks_and_no_others(base, kind) -> None:
    plain, small = SDXL(base).denoiser, SDXL(base, quantization=kind).denoiser
    names = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    changed = {name for name, module in small.named_modules() if isinstance(module, QuantizedLinear)}
    assert changed == {name for name in names if ".attentions." in name}
    assert changed < names  # the embeddings' layers are there too
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_on_it(base, tmp_path, kind, capsys) -> None:
    save_random_pairs(tmp_path / "pairs.parquet", 24, ties=2)
    text = RECIPE.format(family="sdxl", cache=tmp_path / "cache").replace('"base"', f'"{base}"')
    (tmp_path / "small.toml").write_text(text)
    overrides = [f"base.quantization={kind}", "evaluate.prompts=0"]
    outcome = build.run(recipe.load(str(tmp_path / "small.toml"), overrides), tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["margin"] == 0  # adapters with B = 0 on the quantised base: policy and reference are the same
    assert lines[-1]["margin"] != 0
    assert outcome.result["verification"]["effect"] > outcome.result["verification"]["difference"]
    assert outcome.result["adapter_kohya"]
    with pytest.raises(UserError, match=r"base\.quantization"):
        build.run(recipe.load(str(tmp_path / "small.toml"), overrides[1:]), tmp_path / "run", quiet=True)
    # Merged, the update goes into the weights themselves.
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(tmp_path / "run"), "--merge", "--out", str(tmp_path / "merged"), "--json"])
    assert caught.value.code == 0, capsys.readouterr().err
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged", local_files_only=True).unet
    name = next(n for n, module in SDXL(base).denoiser.named_modules() if n.endswith("to_q"))
    before, after = (unet.get_submodule(name).weight for unet in (SDXL(base).denoiser, merged))
    assert 0 < (after - before).abs().max() < 0.5


def test_without_bitsandbytes_it_says_what_to_install(base, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"pip install"):
        SDXL(base, quantization="nf4")


def test_a_weight_that_int8_cannot_hold_is_named(base) -> None:
    denoiser = SDXL(base).denoiser
    name = next(n for n, module in denoiser.named_modules() if n.endswith("to_q"))
    denoiser.get_submodule(name).weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="int8 can't hold"):
        quantized.quantize(denoiser, "int8", CPU)
