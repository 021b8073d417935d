"""Fake tensors: no values, the right metadata, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_dpo.fake_device import FLOAT32_ON_CUDA, FakeDevice


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))


def held(device: FakeDevice) -> nn.Module:
    with device.building():
        made = net()
    return device.hold(made)


def test_a_large_network_runs_forward_and_backward_in_no_memory() -> None:
    device = FakeDevice()
    with device.building(torch.bfloat16):
        wide = nn.Sequential(nn.Linear(100_000, 100_000), nn.ReLU(), nn.Linear(100_000, 10))
    device.hold(wide)
    assert device.ledger.alive.total == 2 * (100_000**2 + 100_000 + 1_000_000 + 10)
    with device.running():
        loss = wide(torch.empty(8, 100_000, dtype=torch.bfloat16)).float().square().mean()
        loss.backward()
        assert loss.item() == 1.0
    assert all(p.grad is not None and p.grad.shape == p.shape for p in wide.parameters())


def test_values_are_one_or_true() -> None:
    with FakeDevice().running():
        x = torch.zeros(3)
        assert (x.sum().item(), int(torch.zeros(1, dtype=torch.int64)), bool((x > 0).all())) == (1.0, 1, True)
        assert torch.isfinite(x).tolist() == [True, True, True]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.transpose(0, 1).contiguous() + 1,
        lambda x: (x @ x.T)[1:, ::2],
        lambda x: torch.cat([x, x], dim=1).to(torch.bfloat16),
        lambda x: x.view(2, 2, 8).permute(2, 0, 1).reshape(8, 4),
        lambda x: functional.layer_norm(x.bfloat16(), (8,)),
        lambda x: functional.conv2d(x.view(1, 4, 2, 4), torch.ones(3, 4, 1, 1)),
        lambda x: functional.scaled_dot_product_attention(*[x.view(1, 2, 2, 8)] * 3),
        lambda x: x.mul_(2).split(2, dim=0)[1],
        lambda x: torch.where(x > 0, x, 1.0).unsqueeze(0).expand(3, 4, 8),
        lambda x: x.sum(dim=1, keepdim=True).sqrt(),
    ],
)
def test_metadata_are_those_of_real_tensors_the_second_time_too(compute) -> None:
    expected = compute(torch.ones(4, 8))
    with FakeDevice().running():
        for _ in range(3):
            got = compute(torch.ones(4, 8))
            assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
            assert got.storage_offset() == expected.storage_offset()
            assert got.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_one_and_true_and_a_float_are_different_arguments() -> None:
    with FakeDevice().running():
        x = torch.ones(2, dtype=torch.int64)
        assert [(x * factor).dtype for factor in (1, 1.0, True, 1)] == [
            torch.int64, torch.float32, torch.int64, torch.int64
        ]  # fmt: skip


def test_views_share_a_storage_the_second_time_too() -> None:
    with FakeDevice().running():
        for _ in range(3):
            x = torch.empty(4, 8)
            # Of a product of matrices that was flattened, the view is made by an operation that doesn't say so.
            y = functional.linear(torch.empty(2, 3, 8), x)
            assert x[1:].view(-1).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert y._base is None or y._base.untyped_storage()._cdata == y.untyped_storage()._cdata


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    device = FakeDevice()
    network = held(device)
    with device.running():
        functional.dropout(network(torch.randn(1, 4, 8, 8)), 0.5).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def test_building_gives_its_default_type_back_after_an_error() -> None:
    with FakeDevice().building(torch.bfloat16):
        assert torch.zeros(1).dtype == torch.bfloat16
    with pytest.raises(RuntimeError), FakeDevice().building(torch.bfloat16):
        raise RuntimeError
    assert torch.zeros(1).dtype == torch.float32


def test_tied_weights_stay_tied() -> None:
    device = FakeDevice()
    with device.building():
        one = nn.Linear(8, 8, bias=False)
        tied = nn.Sequential(one, nn.Sequential(one))
        tied.add_module("third", nn.Linear(8, 8, bias=False))
        tied[2].weight = one.weight  # pyright: ignore
    device.hold(tied)
    assert device.ledger.alive.total == 4 * 64
    assert tied[0].weight is tied[2].weight


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_autocast_follows_the_rules_of_the_device(kind, dtype) -> None:
    original = functional.group_norm
    device = FakeDevice(kind)
    network = held(device)
    with device.running():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            convolved = network[0](torch.empty(1, 4, 8, 8))
            assert convolved.dtype == torch.bfloat16
            assert network[1](convolved).dtype == dtype
        assert network[1](torch.empty(1, 8, 8, 8)).dtype == torch.float32
    assert functional.group_norm is original


def test_the_gpus_rules_hold_where_gradient_checkpointing_repeats_a_pass() -> None:
    device = FakeDevice("cuda")
    network = held(device)
    seen = []
    network[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with device.running():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.empty(1, 4, 8, 8, requires_grad=True)
            y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
        y.sum().backward()
    assert seen == [torch.float32, torch.float32]


def test_the_gpus_rules_are_atens() -> None:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.is_file():
        pytest.skip("this build of torch comes without headers")
    text = header.read_text()
    names = set()
    for macro in ("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE"):
        names |= set(re.findall(r"_\((\w+)", text.split(f"#define {macro}(_)")[1].split("#define")[0]))
    assert {name for name in names if hasattr(functional, name)} == set(FLOAT32_ON_CUDA) - {"interpolate"}
    assert {"upsample_nearest2d", "upsample_bilinear2d"} <= names  # what `interpolate` comes to
