"""Averages and resized ranks are those of the updates themselves, and what is applied is what is merged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_dpo import sources, updates
from lora_dpo.errors import UserError
from lora_dpo.updates import Update


def random_update(rank: int, rows: int = 24, kernel: tuple[int, ...] = (16,), seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.Size(kernel).numel()
    return Update(
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        kernel,
    )


def test_the_mean_of_updates_is_not_the_product_of_means():
    one, two = random_update(3, seed=1), random_update(5, seed=2)
    found = updates.average([{"x": one}, {"x": two}], [0.25, 0.75])["x"]
    torch.testing.assert_close(found.dense(), 0.25 * one.dense() + 0.75 * two.dense())
    assert found.rank == 8


def test_a_layer_that_one_adapter_lacks_counts_as_zero():
    one, two = random_update(3, seed=1), random_update(3, seed=2)
    found = updates.average([{"x": one}, {"x": two, "y": two}], [0.5, 0.5])
    torch.testing.assert_close(found["y"].dense(), 0.5 * two.dense())


def test_adapters_of_different_models():
    with pytest.raises(UserError, match="x has different sizes"):
        updates.average([{"x": random_update(2)}, {"x": random_update(2, rows=8)}], [1, 1])


@pytest.mark.parametrize("kernel", [(16,), (4, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_resizing_is_the_truncated_decomposition_of_the_dense_update(kernel, rank):
    update = random_update(6, kernel=kernel)
    found = updates.resize({"x": update}, rank)
    u, s, v = torch.linalg.svd(update.dense().flatten(1), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(found.updates["x"].dense().flatten(1), best)
    expected = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
    assert found.error == pytest.approx(expected, abs=1e-12)
    assert found.worst == ("x", pytest.approx(expected, abs=1e-12))
    assert found.updates["x"].rank == min(rank, 6)


def test_the_error_is_over_all_layers_and_the_worst_is_named():
    small, large = random_update(1, seed=1), random_update(4, seed=2)
    found = updates.resize({"small": small, "large": large}, 1)
    assert found.worst[0] == "large"
    difference = (found.updates["large"].dense() - large.dense()).norm()
    whole = torch.cat([small.dense(), large.dense()]).norm()
    assert found.error == pytest.approx((difference / whole).item())


def test_an_update_of_zero_has_no_error():
    zero = Update(torch.ones(2, 4, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64), (4,))
    assert updates.resize({"x": zero}, 1).error == 0


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean(dim=(2, 3)))


@torch.no_grad()
def test_applied_is_merged():
    network, x = Network(), torch.randn(2, 4, 8, 8)
    chosen = {
        "conv": random_update(2, rows=6, kernel=(4, 3, 3), seed=1),
        "linear": random_update(2, rows=5, kernel=(6,), seed=2),
    }
    plain = network(x)
    with updates.applied(network, chosen):
        applied = network(x)
    assert torch.equal(network(x), plain)
    updates.merge(network, chosen)
    torch.testing.assert_close(network(x), applied, rtol=1e-4, atol=1e-4)
    assert (applied - plain).abs().max() > 0.1


@pytest.mark.parametrize("module", ["absent", "linear"])
def test_another_base_model(module):
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wrong = {"conv": random_update(2, rows=6, kernel=(4, 3, 3)), module: random_update(2, rows=7, kernel=(6,))}
    with pytest.raises(UserError, match=f"doesn't fit this base model: {module}"):
        updates.merge(network, wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("kernel", [(16,), (4, 3, 3)])
def test_a_file_and_back(tmp_path, kernel):
    update = random_update(3, kernel=kernel)
    state = {f"unet.{key}": tensor for key, tensor in updates.to_state({"a.b": update}).items()}
    save_file(state, tmp_path / "x.safetensors", metadata={"base_unet": "abc"})
    found = sources.open_source(tmp_path / "x.safetensors")
    assert found.header == {"base_unet": "abc"}
    torch.testing.assert_close(found.updates["a.b"].dense(), update.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_the_strength_that_diffusers_writes_into_the_header(tmp_path, rslora, scale):
    update = random_update(4)
    state = {f"unet.{key}": tensor for key, tensor in updates.to_state({"a": update}).items()}
    stated = {"unet.r": 4, "unet.lora_alpha": 16, "unet.use_rslora": rslora, "unet.alpha_pattern": {}}
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(stated)})
    found = sources.open_source(tmp_path / "x.safetensors").updates
    torch.testing.assert_close(found["a"].dense(), scale * update.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["unet.a.lora_A.weight"], "lora_A and no lora_B"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.lora_magnitude_vector"], "don't fit each other"),
        (["text_encoder.a.lora_A.weight"], "more than a UNet's"),
        (["unet.a.weight"], "aren't LoRA pairs"),
    ],
)
def test_files_that_are_something_else(tmp_path, keys, message):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        sources.open_source(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(UserError, match="neither a run directory nor an adapter"):
        sources.open_source(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="can't be read as safetensors"):
        sources.open_source(tmp_path / "text.safetensors")
