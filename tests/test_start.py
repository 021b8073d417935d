"""Training that starts from an existing adapter, and may stay near it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lora_dpo import build, cli, export, kohya, recipe, sources, start
from lora_dpo.adapters import Adapters
from lora_dpo.errors import UserError
from lora_dpo.families import Family
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.recipe_errors import RecipeError
from tests.support.dying import killed_and_resumed
from tests.support.models import save_random_pairs, save_random_sd
from tests.support.training import World, attach, make_world, stream
from tests.test_end_to_end import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd_world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion)


def written(world: World, folder: Path, layout: str = "diffusers", **options: Any) -> tuple[Path, torch.Tensor]:
    """A trained-enough adapter's file, and what its policy predicts."""
    family = world.family()
    adapters = attach(family, moved=0.1, **options)
    prediction = predicted(world, family)
    if layout == "diffusers":
        return export.save(adapters, folder, {}), prediction
    alpha = adapters.scale * adapters.rank
    return kohya.save(adapters.state_dict(), alpha, family, folder / "kohya.safetensors", {}), prediction


@torch.no_grad()
def predicted(world: World, family) -> torch.Tensor:
    return export.predict(family, export.probe(world.pairs(family), family))


def begun(world: World, file: Path, **options: Any) -> tuple[Family, Adapters, int]:
    family = world.family()
    source = sources.open_source(file).named_as_in(family)
    adapters = attach(family, seed=1, **options)
    return family, adapters, start.start_from(adapters, source.updates, file)


@pytest.mark.parametrize(
    ("kind", "layout", "theirs", "mine"),
    [
        ("world", "diffusers", {"alpha": 12.0}, {"alpha": 4.0}),
        ("world", "kohya", {"alpha": 6.0, "rslora": True}, {"alpha": 3.0}),
        ("sd_world", "diffusers", {"alpha": 6.0}, {"rank": 9, "alpha": 5.0, "rslora": True}),
        ("sd_world", "kohya", {"alpha": 8.0}, {"rank": 9}),
        ("world", "kohya", {"alpha": 8.0, "targets": "attention+conv"}, {"rank": 6, "targets": "all-linear+conv"}),
        ("sd_world", "diffusers", {"alpha": 8.0, "targets": "attention+conv"}, {"targets": "all-linear+conv"}),
        ("sd_world", "kohya", {"targets": ["conv1", "to_q", "ff.net.0.proj"]}, {"targets": "all-linear+conv"}),
    ],
)
def test_the_policy_starts_as_the_base_with_that_adapter(request, tmp_path, kind, layout, theirs, mine):
    world = request.getfixturevalue(kind)
    file, wanted = written(world, tmp_path, layout, **theirs)
    family, _, _ = begun(world, file, **mine)
    torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)


def test_with_the_same_settings_the_weights_are_the_same_bits(world, tmp_path):
    file, _ = written(world, tmp_path, alpha=8.0)
    _, adapters, _ = begun(world, file, alpha=8.0)
    trained = attach(world.family(), moved=0.1, alpha=8.0).state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in adapters.state_dict().items())


def test_a_larger_rank_has_room_that_adds_nothing_yet_and_can_learn(world, tmp_path):
    file, _ = written(world, tmp_path)
    family, adapters, missing = begun(world, file, rank=7)
    assert missing == 0
    fresh = attach(world.family(), seed=1, rank=7).parameters()
    for name, weight in adapters.parameters().items():
        if ".lora_A." in name:
            assert torch.equal(weight[4:], fresh[name][4:])
            assert not torch.equal(weight[:4], fresh[name][:4])
        else:
            assert weight[:, 4:].eq(0).all()
    family.predict(*inputs(world, family)).square().mean().backward()
    b = [p.grad for name, p in adapters.parameters().items() if ".lora_B." in name]
    assert all(grad is not None and grad[:, 4:].abs().max() > 0 for grad in b)


def inputs(world: World, family):
    probe = export.probe(world.pairs(family), family)
    return probe.x_t, probe.t, probe.conditioning


def test_layers_that_the_file_lacks_start_as_the_base(world, tmp_path):
    file, wanted = written(world, tmp_path, targets=["attn2.to_q"])
    family, adapters, missing = begun(world, file)
    there = [name for name in adapters.layers if name.endswith("attn2.to_q")]
    assert missing == len(adapters.layers) - len(there) > 0
    torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "mine", "message"),
    [
        ({"rank": 6, "alpha": 6.0}, {}, "it has rank 6, and adapter.rank is 4"),
        ({"targets": "attention+ff"}, {}, r"layers are not in adapter.targets \(.*ff.net"),
    ],
)
def test_an_adapter_that_does_not_fit_the_recipe(world, tmp_path, theirs, mine, message):
    file, _ = written(world, tmp_path, **theirs)
    family = world.family()
    adapters = attach(family, **mine)
    before = adapters.state_dict()
    with pytest.raises(UserError, match=message) as error:
        start.start_from(adapters, sources.open_source(file).updates, file)
    assert str(file) in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in adapters.state_dict().items())


def test_an_adapter_of_another_model(world, sd_world, tmp_path):
    file, _ = written(world, tmp_path)
    state = load_file(file)
    name = next(key for key in state if "attn2.to_k.lora_A" in key)
    save_file(state | {name: torch.zeros(4, 7)}, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"1 of its \d+ layers have other sizes than the base's: .*attn2.to_k is of"):
        begun(world, tmp_path / "narrow.safetensors")
    file, _ = written(world, tmp_path, "kohya")
    with pytest.raises(UserError, match="layers are not in this base model"):
        begun(sd_world, file)


def test_kohyas_layout_in_the_ways_that_programs_write_it(world, tmp_path):
    file, wanted = written(world, tmp_path, "kohya", alpha=12.0)
    family = world.family()
    family.pipeline().load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
    torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)  # diffusers reads it so
    state = load_file(file)
    as_convolutions = {key: t[..., None, None] if t.dim() == 2 else t for key, t in state.items()}
    save_file(as_convolutions, tmp_path / "1x1.safetensors")
    by_diffusers_blocks = {}
    for name, weight in attach(world.family(), moved=0.1).state_dict().items():
        module, part, _ = name.rsplit(".", 2)
        plain = f"lora_unet_{module.replace('.', '_')}"
        by_diffusers_blocks[f"{plain}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = weight
        by_diffusers_blocks[f"{plain}.alpha"] = torch.tensor(12.0)
    save_file(by_diffusers_blocks, tmp_path / "blocks.safetensors")
    for name in ("1x1", "blocks"):
        family, _, _ = begun(world, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_te1_text_model_x.lora_down.weight", "lora_te1_text_model_x.lora_up.weight"], "more than a UNet's"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.dora_scale"], "aren't plain LoRA"),
        (["lora_unet_x.hada_w1_a"], "aren't plain LoRA"),
        (["lora_unet_x.lora_down.weight"], "there is no lora_unet_x.lora_up.weight"),
    ],
)
def test_files_of_kohyas_layout_that_are_something_else(tmp_path, keys, message):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        sources.open_source(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@pytest.fixture
def near(world, tmp_path):
    """(family, adapters, a part of a step) of a run that starts from an adapter and stays near it."""
    file, _ = written(world, tmp_path)

    def made(**options):
        family, adapters, _ = begun(world, file, **options)
        adapters.keep_as_reference()
        return family, adapters, next(stream(world.pairs(family), family).batch(0).parts())

    return made


def backward(world, family, adapters, part, pair_pass="plain"):
    method = PairMethod(stream(world.pairs(family), family), family, adapters, Dpo(500.0), pair_pass=pair_pass)
    return method.backward(part)


@pytest.mark.parametrize("pair_pass", ["plain", "split"])
@pytest.mark.parametrize("options", [{}, {"rank": 7, "alpha": 5.0}])
def test_near_its_start_the_first_margin_is_zero_bit_for_bit(world, near, options, pair_pass):
    family, adapters, part = near(**options)
    found = backward(world, family, adapters, part, pair_pass)
    assert found.sums["margin"] == 0
    assert torch.equal(found.per_pair, torch.full_like(found.per_pair, math.log(2)))
    assert found.sums["error_winner"] == found.sums["ref_error_winner"]
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.parameters().values())


def test_the_reference_stays_what_the_start_was(world, near, tmp_path):
    _, wanted = written(world, tmp_path)
    family, adapters, _ = near()
    names = set(adapters.state_dict())
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            parameter.add_(0.1)
    moved = predicted(world, family)
    with adapters.reference():
        torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(ZeroDivisionError), adapters.reference():
            raise ZeroDivisionError
        torch.testing.assert_close(predicted(world, family), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(predicted(world, family), moved)
    assert set(adapters.state_dict()) == names
    trainable = {id(p) for p in family.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapters.parameters().values()}
    adapters.detach()
    assert torch.equal(predicted(world, family), predicted(world, world.family()))


def test_the_reference_has_no_dropout_and_checkpointing_repeats_the_policy(world, near):
    def gradient(*, checkpointed: bool):
        family, adapters, part = near(dropout=0.5)
        adapters.train()
        if checkpointed:
            family.denoiser.enable_gradient_checkpointing()
        return backward(world, family, adapters, part), adapters.parameters()

    (plain, one), (_, two) = gradient(checkpointed=False), gradient(checkpointed=True)
    assert plain.sums["margin"] != 0  # the policy's dropout
    family, adapters, part = near()
    assert backward(world, family, adapters, part).sums["ref_error_winner"] == plain.sums["ref_error_winner"]
    for name, parameter in one.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(two[name].grad, parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder with a recipe, its base and pairs, and a finished SFT run, `sft`."""
    folder = tmp_path_factory.mktemp("chain")
    save_random_sd(folder / "base")
    save_random_pairs(folder / "pairs.parquet", 24, ties=2)
    (folder / "small.toml").write_text(RECIPE.format(family="stable_diffusion", cache=folder / "cache"))
    text = (folder / "small.toml").read_text().replace('kind = "dpo"\nbeta = 500', 'kind = "sft"')
    (folder / "sft.toml").write_text(text.replace('name = "small"', 'name = "sft"'))
    assert command("train", folder / "sft.toml", "evaluate.prompts=0", "--run-dir", folder / "sft") == 0
    return folder


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def near_sft(folder: Path, run: Path, *more: str) -> list[object]:
    keys = [f"adapter.start={folder / 'sft'}", "method.reference=adapter", "evaluate.prompts=0", "adapter.rank=6"]
    return ["train", folder / "small.toml", *keys, *more, "--run-dir", run]


@pytest.fixture(scope="module")
def stayed(chain) -> Path:
    """A finished DPO run that started from the SFT run and stayed near it."""
    assert command(*near_sft(chain, chain / "dpo")) == 0
    return chain / "dpo"


def test_sft_then_dpo_from_the_command_line(chain, stayed):
    result = json.loads((stayed / "result.json").read_text())
    sft = json.loads((chain / "sft" / "result.json").read_text())
    file = chain / "sft" / "adapter" / export.FILE
    assert result["reference"] == "adapter"
    assert result["start"]["path"] == str(file)
    assert (sft["reference"], sft["start"]) == ("base", None)
    first, *_, last = map(json.loads, (stayed / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == 0
    assert last["margin"] != 0
    # The held-out pairs' reference is the SFT adapter too, whose errors are known from its own evaluation.
    assert result["implicit"]["ref_error_winner"] == pytest.approx(sft["implicit"]["error_winner"], rel=1e-5)
    assert result["implicit"]["ref_error_winner"] != pytest.approx(sft["implicit"]["ref_error_winner"], rel=1e-5)
    card = (stayed / "README.md").read_text("utf-8")
    assert f"SHA-256 `{result['start']['sha256']}`) and stays near it" in card
    assert str(chain) not in card
    with safetensors.safe_open(stayed / result["adapter"], "pt") as opened:
        header = opened.metadata()
    assert (header["reference"], header["start_sha256"]) == ("adapter", result["start"]["sha256"])


def test_killed_and_resumed_it_ends_with_the_same_adapter(chain, stayed, tmp_path, monkeypatch):
    _, name, *arguments, _, _ = near_sft(chain, tmp_path)
    settings = recipe.load(str(name), [str(argument) for argument in arguments])
    killed = killed_and_resumed(settings, tmp_path / "killed", monkeypatch)
    one, two = (load_file(run / "adapter" / export.FILE) for run in (stayed, killed))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_another_start_in_the_same_place_is_another_run(chain, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(chain / "sft", folder / "sft")
    shutil.copy(chain / "small.toml", folder)
    for name in ("base", "pairs.parquet"):
        (folder / name).symlink_to(chain / name)
    assert command(*near_sft(folder, tmp_path / "dpo", "evaluate.implicit_pairs=0", "train.steps=1")) == 0
    file = folder / "sft" / "adapter" / export.FILE
    state = load_file(file)
    save_file({key: tensor * 2 for key, tensor in state.items()}, file)
    (tmp_path / "dpo" / "result.json").unlink()
    assert command(*near_sft(folder, tmp_path / "dpo", "evaluate.implicit_pairs=0", "train.steps=1")) == 2
    assert "adapter.start: " in capsys.readouterr().err


def test_a_start_of_other_weights_is_told(chain, tmp_path, capsys):
    file = chain / "sft" / "adapter" / export.FILE
    with safetensors.safe_open(file, "pt") as opened:
        header = opened.metadata() | {"base_unet": "another"}
    save_file(load_file(file), tmp_path / "other.safetensors", metadata=header)
    words = near_sft(chain, tmp_path / "dpo", f"adapter.start={tmp_path / 'other.safetensors'}", "train.steps=1")
    assert command(*words) == 0
    said = capsys.readouterr()
    words = " ".join((said.out + said.err).split())
    assert "training starts from " in words
    assert "trained on other weights than this base's" in words


def test_a_run_that_is_not_finished_is_told_before_anything_else(chain, tmp_path, capsys, monkeypatch):
    half = shutil.copytree(chain / "sft", tmp_path / "half")
    (half / "result.json").unlink()
    monkeypatch.setattr(build.parts, "family", lambda *_: pytest.fail("the base was opened"))
    assert command(*near_sft(chain, tmp_path / "dpo", f"adapter.start={half}")) == 2
    assert "this run is not finished" in capsys.readouterr().err


def test_what_a_recipe_may_say_of_it(chain, tmp_path):
    def problems(text: str, *arguments: str) -> dict[str, tuple[str, int | None]]:
        file = chain / "wrong.toml"
        file.write_text((chain / "small.toml").read_text().replace("rank = 4", text))
        with pytest.raises(RecipeError) as caught:
            recipe.load(str(file), arguments)
        return {".".join(p.key): (p.message, p.place.line if p.place else None) for p in caught.value.problems}

    found = problems('start = "nowhere"')
    assert found == {"adapter.start": (f"{chain / 'nowhere'} doesn't exist", 11)}
    found = problems("rank = 4", "method.reference=adapter")
    assert found == {"method.reference": ('got "adapter", but adapter.start names none', None)}
    found = problems('start = "sft"', "method.kind=sft", "method.reference=adapter")
    assert "belongs to dpo" in found["method.reference"][0]
    right = recipe.load(str(chain / "small.toml"), [f"adapter.start={chain / 'sft'}"])
    assert right.adapter.start == str(chain / "sft")


def test_an_exported_copy_may_come_from_kohyas_layout(world, tmp_path, capsys):
    file, _ = written(world, tmp_path / "mine", "kohya", alpha=12.0)
    words = ["export", file, "--base", world.base, "--family", "sdxl", "--out", tmp_path / "out", "--json"]
    assert command(*words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["effect"] > 1e-3
    trained = attach(world.family(), moved=0.1, alpha=12.0).state_dict()
    found = load_file(tmp_path / "out" / export.FILE)
    for name, weight in trained.items():
        wanted = weight * 3 if ".lora_B." in name else weight
        torch.testing.assert_close(found[f"unet.{name}"], wanted)
