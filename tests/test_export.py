"""The exported file loads in stock diffusers and is the trained policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lora_dpo import export
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.training import World, attach, make_world

# Euler's scheduler, in stock pipelines.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd_world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("world", {}),
        ("world", {"alpha": 12.0}),
        ("world", {"alpha": 1.0, "targets": "attention+ff", "dropout": 0.5}),
        ("world", {"targets": ["conv1", "to_q"], "alpha": 8.0}),
        ("world", {"alpha": 8.0, "rslora": True}),
        ("sd_world", {"alpha": 8.0, "targets": "attention+conv"}),
        ("sd_world", {"alpha": 12.0, "targets": "all-linear"}),
    ],
)
def test_stock_diffusers_loads_the_policy(request, tmp_path, name, options):
    world: World = request.getfixturevalue(name)
    family = world.family()
    probe = export.probe(world.pairs(family), family)
    with torch.no_grad():
        base = family.predict(probe.x_t, probe.t, probe.conditioning)
        adapters = attach(family, moved=0.1, **options)
        policy = family.predict(probe.x_t, probe.t, probe.conditioning)
    path = export.save(adapters, tmp_path / "adapter", {"method": "dpo"})
    found = export.verify(adapters, family, path, probe)
    assert found.difference <= found.tolerance < 1e-4
    assert found.effect > 100 * found.tolerance

    pipeline = family.pipeline()
    assert pipeline.get_active_adapters() == [export.LOADED_NAME]
    with torch.no_grad():
        torch.testing.assert_close(
            family.predict(probe.x_t, probe.t, probe.conditioning), policy, rtol=0, atol=found.tolerance
        )
        pipeline.disable_lora()
        assert torch.equal(family.predict(probe.x_t, probe.t, probe.conditioning), base)
        pipeline.enable_lora()
        torch.testing.assert_close(
            family.predict(probe.x_t, probe.t, probe.conditioning), policy, rtol=0, atol=found.tolerance
        )


def test_a_fresh_pipeline_paints_the_same_picture(world, tmp_path):
    """What a user does with the file, against the adapters in memory."""

    def picture(pipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}
        return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    family = world.family()
    adapters = attach(family, moved=0.1, alpha=12.0)
    own = picture(family.pipeline())
    path = export.save(adapters, tmp_path, {})
    stock = StableDiffusionXLPipeline.from_pretrained(world.base)
    plain = picture(stock)
    stock.load_lora_weights(path.parent)
    loaded = picture(stock)
    torch.testing.assert_close(loaded, own, rtol=0, atol=1e-5)
    assert (plain - own).abs().max() > 1e-3


def test_the_file_has_the_update_itself_and_its_metadata(world, tmp_path):
    adapters = attach(world.family(), moved=0.1, alpha=12.0)
    path = export.save(adapters, tmp_path, {"base": "tiny", "beta": "500"})
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "base": "tiny", "beta": "500"}
    written, own = load_file(path), adapters.state_dict()
    assert set(written) == {f"unet.{name}" for name in own}
    for name, weight in own.items():
        assert torch.equal(written[f"unet.{name}"], weight * 3.0 if ".lora_B." in name else weight)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    state = {"unet.b": torch.arange(3.0), "unet.a": torch.ones(2, 2)}
    strings = {f"key {n}": "ä" * n for n in range(20)}
    files = [export.write(state, tmp_path / f"{n}.safetensors", strings).read_bytes() for n in range(4)]
    assert len(set(files)) == 1
    assert load_file(tmp_path / "0.safetensors").keys() == state.keys()
    assert all(torch.equal(load_file(tmp_path / "0.safetensors")[name], state[name]) for name in state)
    with safetensors.safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **strings}


def test_a_wrong_file_is_noticed(world, tmp_path):
    family = world.family()
    probe = export.probe(world.pairs(family), family)
    adapters = attach(family, moved=0.1)
    path = export.save(adapters, tmp_path, {})
    state = load_file(path)
    changed = next(name for name in state if ".lora_B." in name)
    state[changed] = -state[changed]
    save_file(state, path)
    with pytest.raises(LoraDpoError, match="predictions differ"):
        export.verify(adapters, family, path, probe)


def test_the_probe_is_fixed(world):
    one, two = (export.probe(world.pairs(family), family) for family in (world.family(), world.family()))
    assert torch.equal(one.x_t, two.x_t)
    assert torch.equal(one.t, two.t)


def test_a_place_that_can_not_be_written(world, tmp_path):
    blocked = Path(tmp_path, "file")
    blocked.write_text("in the way")
    adapters = attach(world.family())
    with pytest.raises(UserError, match="file"):
        export.save(adapters, blocked / "adapter", {})
