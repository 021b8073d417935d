"""DoRA: the length of each output's weights is learned apart from their direction."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from lora_dpo import checkpoint, export, kohya, optimizers, recipe, sources, start, updates
from lora_dpo.adapters import Adapters
from lora_dpo.errors import UserError
from lora_dpo.families.quantized import QuantizedLinear
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from tests.support.dying import killed_and_resumed
from tests.support.models import save_random_pairs, save_random_sdxl
from tests.support.training import World, attach, make_world, stream
from tests.test_adapted_layers import BF16, TARGETS, block, kept, passed
from tests.test_end_to_end import RECIPE
from tests.test_reexport import command, picture, stock

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
END = ".lora_magnitude_vector"


def move(adapters: Adapters, seed: int = 2) -> Adapters:
    """As training would: B random, magnitudes a little off."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.parameters().items():
        noise = torch.randn(parameter.shape, generator=generator)
        if ".lora_B." in name:
            parameter.data = noise * 0.1
        elif name.endswith(END):
            parameter.data *= 1 + 0.1 * noise
    return adapters


def small(dtype=torch.float32, alpha: float = 6.0, **options) -> tuple[nn.ModuleDict, Adapters]:
    model = block(dtype)
    return model, Adapters.attach(model, rank=4, alpha=alpha, targets=TARGETS, seed=0, dora=True, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@torch.no_grad()
def predicted(world: World, family) -> torch.Tensor:
    return export.predict(family, export.probe(world.pairs(family), family))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (BF16, False)])
def test_it_starts_as_the_base_bit_for_bit(dtype, autocast):
    with torch.autocast("cpu", BF16, enabled=autocast):
        base = passed(block(dtype), dtype)
        model, adapters = small(dtype)
        assert adapters.is_dora
        assert adapters.norm() == 0
        assert torch.equal(passed(model, dtype), base)
        move(adapters)
        assert not torch.equal(passed(model, dtype), base)
        with adapters.reference():
            assert torch.equal(passed(model, dtype), base)


@torch.no_grad()
def test_the_weights_in_effect_are_the_papers(world):
    model, adapters = small()
    move(adapters)
    wanted, state, plain = passed(model), adapters.state_dict(), block()
    moved = 0.0
    for name in adapters.layers:
        layer = plain.get_submodule(name)
        down, up = (state[f"{name}.{part}.weight"].flatten(1) for part in ("lora_A", "lora_B"))
        direction = layer.weight + adapters.scale * (up @ down).reshape(layer.weight.shape)
        length = direction.flatten(1).norm(dim=1).reshape(-1, *(1,) * (direction.dim() - 1))
        weight = state[name + END].reshape(length.shape) * direction / length
        moved += (weight - layer.weight).square().sum().item()
        layer.weight.copy_(weight)
    torch.testing.assert_close(passed(plain), wanted, rtol=1e-4, atol=1e-5)
    assert adapters.norm() == pytest.approx(math.sqrt(moved), rel=1e-4)


def test_outputs_and_gradients_are_pefts():
    model, adapters = small()
    move(adapters)
    theirs = block().requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(adapters.layers), use_dora=True)
    inject_adapter_in_model(config, theirs)
    weights = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if ".lora_" in n}
    weights = {n.removesuffix(".weight") if END in n else n: p for n, p in weights.items()}
    for name, value in adapters.state_dict().items():
        assert weights[name].shape == value.shape
        weights[name].data = value
    found, wanted = passed(model), passed(theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in adapters.parameters().items():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_kept_in_float32_beside_a_base_in_half_precision(autocast):
    dora, plain = small(BF16)[0], block(BF16)
    Adapters.attach(plain, rank=4, alpha=6.0, targets=TARGETS, seed=0)
    found, lora = kept(dora, BF16, autocast=autocast), kept(plain, BF16, autocast=autocast)
    lengths = sum(4 * 3 * parameter.shape.numel() for name, parameter in dora.named_parameters() if END in name)
    assert found[torch.float32] <= lora.get(torch.float32, 0) + lengths


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_the_float32_weights(autocast):
    def gradients(dtype, autocast):
        model, adapters = small(dtype)
        move(adapters)
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            passed(model, dtype).float().square().mean().backward()
        return {name: parameter.grad for name, parameter in adapters.parameters().items()}

    exact, rounded = gradients(torch.float32, False), gradients(BF16, autocast)
    for name, grad in rounded.items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).norm() < 0.05 * exact[name].norm()


def test_dropout_is_of_the_update_alone():
    model, adapters = small(dropout=0.5)
    adapters.train()
    torch.manual_seed(0)
    assert torch.equal(passed(model), passed(block()))  # nothing to drop yet
    move(adapters)
    assert not torch.equal(passed(model), passed(model))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_base_may_be_a_quantised_layer(kind):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": QuantizedLinear(nn.Linear(64, 32), kind, torch.device("cpu"))})
    x = torch.randn(3, 64)
    base, weight, bias = model["layer"](x), model["layer"].weight, model["layer"].bias
    adapters = Adapters.attach(model, rank=4, alpha=4.0, targets=["layer"], seed=0, dora=True)
    assert torch.equal(model["layer"](x), base)
    state = move(adapters).state_dict()
    direction = weight + state["layer.lora_B.weight"] @ state["layer.lora_A.weight"]
    wanted = state["layer" + END][:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model["layer"](x), x @ wanted.T + bias, rtol=1e-4, atol=1e-5)


def test_an_output_without_weights_has_no_direction():
    model = nn.ModuleDict({"layer": nn.Linear(8, 4)})
    model["layer"].weight.data[2] = 0
    with pytest.raises(UserError, match="layer: DoRA rescales weights") as error:
        Adapters.attach(model, rank=2, alpha=2.0, targets=["layer"], seed=0, dora=True)
    assert "adapter.dora" in str(error.value)


@pytest.mark.parametrize("kind", ["adamw", "schedule_free_adamw"])
def test_weight_decay_leaves_the_lengths_alone(kind):
    model, adapters = small()
    parameters = adapters.parameters()
    before = adapters.state_dict()
    optimizer = optimizers.build(kind, parameters, learning_rate=1e-2, weight_decay=10.0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in adapters.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.endswith("lora_A.weight"))
    passed(model).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(v, before[n]) for n, v in adapters.state_dict().items() if n.endswith(END))


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [("float32", "attention"), ("float32", "all-linear+conv"), ("bfloat16", "attention")],
)
def test_stock_diffusers_reads_the_policy_from_its_file(world, tmp_path, dtype, targets):
    family = world.kind(world.base, dtype=dtype)
    adapters = move(attach(family, dora=True, alpha=6.0, targets=targets))
    file = export.save(adapters, tmp_path, {})
    found = export.verify(adapters, family, file, export.probe(world.pairs(family), family))
    assert found.difference <= found.tolerance
    assert found.effect > (100 if dtype == "float32" else 3) * found.tolerance
    with pytest.raises(kohya.NotInKohyasLayout, match="disagree about DoRA's magnitudes"):
        kohya.save(adapters.state_dict(), 6.0, family, tmp_path / "kohya.safetensors", {})
    assert not (tmp_path / "kohya.safetensors").exists()


@pytest.mark.parametrize("theirs", ["LoRA", "DoRA"])
@pytest.mark.parametrize("rank", [4, 7])
def test_it_goes_on_from_lora_and_from_dora_and_may_stay_near(world, tmp_path, theirs, rank):
    family = world.family()
    made = attach(family, dora=theirs == "DoRA", alpha=12.0, targets="attention+conv")
    file, wanted = export.save(move(made), tmp_path, {}), predicted(world, family)
    family = world.family()
    adapters = attach(family, dora=True, rank=rank, alpha=5.0, targets="all-linear+conv", seed=1)
    start.start_from(adapters, sources.open_source(file).updates, file)
    torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-4, atol=1e-4)
    adapters.keep_as_reference()
    pairs = world.pairs(family)
    method = PairMethod(stream(pairs, family), family, adapters, Dpo(500.0))
    found = method.backward(next(stream(pairs, family).batch(0).parts()))
    assert found.sums["margin"] == 0
    assert torch.equal(found.per_pair, torch.full_like(found.per_pair, math.log(2)))


def test_lora_does_not_go_on_from_dora(world, tmp_path):
    file = export.save(attach(world.family(), dora=True), tmp_path, {})
    adapters = attach(world.family())
    before = adapters.state_dict()
    with pytest.raises(UserError, match="it is DoRA") as error:
        start.start_from(adapters, sources.open_source(file).updates, file)
    assert "adapter.dora = true" in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in adapters.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("targets", ["attention", "all-linear+conv"])
def test_updates_are_applied_and_merged_as_the_layers_compute_them(world, targets):
    family = world.family()
    adapters = move(attach(family, dora=True, alpha=6.0, targets=targets))
    wanted = predicted(world, family)
    found = updates.from_state(adapters.state_dict(), adapters.scale)
    assert updates.is_dora(found)
    adapters.detach()
    with updates.applied(family.denoiser, found):
        torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-4, atol=1e-4)
    again = updates.from_state(updates.to_state(found))
    assert all(torch.equal(again[n].magnitude, u.magnitude.float().double()) for n, u in found.items())
    updates.merge(family.denoiser, found)
    torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-4, atol=1e-4)
    smaller = updates.resize(found, 2).updates
    assert all(torch.equal(update.magnitude, found[name].magnitude) for name, update in smaller.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_random_sdxl(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 24, ties=2)
    text = RECIPE.format(family="sdxl", cache=folder / "cache").replace("alpha = 8", "alpha = 8\ndora = true")
    (folder / "small.toml").write_text(text)
    assert command("train", folder / "small.toml", "--run-dir", folder / "run", *FEWER) == 0
    return folder / "run"


FEWER = ("evaluate.prompts=0", "train.ema_decay=0.5")


def test_a_run_learns_lengths_and_leaves_kohyas_file_out(run):
    result = json.loads((run / "result.json").read_text())
    assert result["adapter_kohya"] is None
    assert not (run / "kohya").exists()
    assert result["verification"]["difference"] <= result["verification"]["tolerance"]
    first, last = (checkpoint.at(run, step).adapter() for step in (2, 4))
    lengths = [name for name in last if name.endswith(END)]
    assert lengths
    assert all(not torch.equal(first[name], last[name]) for name in lengths)
    header = sources.open_source(run).header
    assert header["dora"] == "True"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert line["margin"] == 0
    assert line["adapter_norm"] > 0


def test_killed_and_resumed_it_ends_with_the_same_adapter(run, tmp_path, monkeypatch):
    settings = recipe.load(str(run.parent / "small.toml"), FEWER)
    killed = killed_and_resumed(settings, tmp_path / "killed", monkeypatch)
    one, two = (load_file(folder / "adapter" / export.FILE) for folder in (run, killed))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_its_exports_are_right_or_refused(run, tmp_path, capsys):
    assert command("export", run, "--step", "2", "--out", tmp_path / "early", "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapter_kohya"] is None
    assert command("export", run, "--rank", "2", "--out", tmp_path / "two") == 0
    said = capsys.readouterr().err
    assert "of the update (its magnitudes apart) is lost" in said
    assert "predictions moved by" in said
    assert command("export", run, "--merge", "--out", tmp_path / "merged") == 0
    with torch.no_grad():
        adapted, merged, base = (
            picture(pipeline)
            for pipeline in (
                stock(run, run / "adapter" / export.FILE),
                stock(run, base=tmp_path / "merged"),
                stock(run),
            )
        )
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (adapted - base).abs().max() > 1e-3
    for words in ([run, tmp_path / "early"], [run, "--weight", "0.5"]):
        assert command("export", *words, "--out", tmp_path / "mean") == 2
        assert "can't be averaged or weighed" in capsys.readouterr().err
