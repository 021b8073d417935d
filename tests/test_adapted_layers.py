"""The pass of a layer with LoRA: peft's in float32, lighter in half precision."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lora_dpo import export
from lora_dpo.adapters import Adapters
from lora_dpo.families.quantized import QuantizedLinear
from tests.support.training import attach, make_world

BF16 = torch.bfloat16


def block(dtype=torch.float32) -> nn.Module:
    """A transformer block of SDXL, small, and a convolution after it."""
    torch.manual_seed(0)
    attention = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)
    return nn.ModuleDict({"attention": attention, "conv1": nn.Conv2d(32, 8, 3, stride=2, padding=1)}).to(dtype)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"]


def passed(model: nn.Module, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 64, 32, generator=generator), torch.randn(2, 5, 24, generator=generator)
    inner = model["attention"](x.to(dtype), encoder_hidden_states=context.to(dtype))
    return model["conv1"](inner.transpose(1, 2).reshape(2, 32, 8, 8))


def ours(dtype=torch.float32, alpha: float = 4.0, **options) -> tuple[nn.Module, Adapters]:
    model = block(dtype)
    adapters = Adapters.attach(model, rank=4, alpha=alpha, targets=TARGETS, seed=0, **options)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapters.parameters().items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model, adapters


def peft(adapters: Adapters, dtype=torch.float32) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The same adapter as peft computes it, its weights in float32."""
    model = block(dtype).requires_grad_(False)
    names = list(adapters.layers)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=adapters.alpha, target_modules=names), model)
    weights = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".lora_" in n}
    for name, value in adapters.state_dict().items():
        weights[name].data = value
    return model, weights


@pytest.mark.parametrize("alpha", [4.0, 8.0, 1.0])
def test_in_float32_it_is_what_peft_computes_bit_for_bit(alpha):
    mine, adapters = ours(alpha=alpha)
    theirs, weights = peft(adapters)
    found, wanted = passed(mine), passed(theirs)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in adapters.parameters().items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, weights[name].grad)


def test_a_scale_that_is_no_power_of_two_differs_by_rounding_only():
    mine, adapters = ours(alpha=3.0)
    torch.testing.assert_close(passed(mine), passed(peft(adapters)[0]), rtol=1e-5, atol=1e-6)


def kept(model: nn.Module, dtype: torch.dtype, *, autocast: bool) -> dict[torch.dtype, int]:
    """Bytes that autograd keeps, parameters apart, by element type."""
    seen, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    alive = []

    def pack(tensor):
        alive.append(tensor)  # or another tensor would get its address
        if (place := tensor.untyped_storage().data_ptr()) not in seen:
            seen.add(place)
            total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", BF16, enabled=autocast):
        passed(model, dtype).float().square().mean()
    return total


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_kept_in_float32_beside_a_base_in_half_precision(autocast):
    mine, adapters = ours(BF16)
    theirs, _ = peft(adapters, BF16)
    light, plain = kept(mine, BF16, autocast=autocast), kept(theirs, BF16, autocast=autocast)
    head = 2 * 8 * 4 * 4 * 4  # the loss's own copy of the output
    statistics = 6 * 2 * 64 * 4  # mean and deviation of three layer norms
    assert light[torch.float32] <= head + statistics
    # What peft keeps beyond: the inputs of the ten layers, in the adapter's precision, or cast anew for each layer.
    tokens, words = 2 * 64 * 32, 2 * 5 * 24
    extra = (7 * tokens + 2 * words) * (2 if autocast else 4)
    assert sum(plain.values()) - sum(light.values()) >= 0.4 * extra


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_reach_the_float32_weights(autocast, dropout):
    def gradients(dtype, autocast):
        model, adapters = ours(dtype, dropout=dropout)
        adapters.train()
        torch.manual_seed(3)
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            passed(model, dtype).float().square().mean().backward()
        return {name: parameter.grad for name, parameter in adapters.parameters().items()}

    exact, rounded = gradients(torch.float32, False), gradients(BF16, autocast)
    for name, grad in rounded.items():
        assert grad.dtype == torch.float32
        if dropout == 0:  # masks are other ones in another precision
            assert (grad - exact[name]).norm() < 0.05 * exact[name].norm()
        else:
            assert grad.abs().max() > 0


def test_the_reference_and_peft_s_own_switch_give_the_base():
    model, adapters = ours(BF16)
    base = passed(block(BF16), BF16)
    with adapters.reference():
        assert torch.equal(passed(model, BF16), base)
    for layer in adapters.layers.values():
        layer.enable_adapters(False)
    assert torch.equal(passed(model, BF16), base)


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_in_half_precision_a_stock_pipeline_computes_the_same_bits_from_the_file(tmp_path, alpha):
    world = make_world(tmp_path / "world")
    family = world.kind(world.base, dtype="bfloat16")
    adapters = attach(family, moved=0.1, alpha=alpha)
    file = export.save(adapters, tmp_path / "adapter", {})
    found = export.verify(adapters, family, file, export.probe(world.pairs(family), family))
    assert found.effect > 1e-3
    assert found.difference == 0


@pytest.mark.parametrize("kind", ["int8", "nf4", "bitsandbytes' own"])
def test_the_base_may_be_a_quantised_layer(kind):
    library = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32, dtype=BF16)
    if kind in ("int8", "nf4"):
        layer = QuantizedLinear(plain, kind, torch.device("cpu"))
    else:
        layer = library.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        layer.load_state_dict(plain.float().state_dict())
        layer = layer.to("cpu")
    model, x = nn.ModuleDict({"layer": layer}), torch.randn(3, 64, dtype=BF16)
    base = model["layer"](x)
    adapters = Adapters.attach(model, rank=4, alpha=4.0, targets=["layer"], seed=0)
    assert torch.equal(model["layer"](x), base)
    for parameter in adapters.parameters().values():
        parameter.data.normal_(std=0.1)
    adapted = model["layer"](x)
    assert adapted.dtype == BF16
    assert not torch.equal(adapted, base)
    adapted.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters().values())
    with adapters.reference():
        assert torch.equal(model["layer"](x), base)
