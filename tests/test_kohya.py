"""The file in kohya's layout has the names other programs look up, and is the trained policy."""

from __future__ import annotations

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lora_dpo import export, kohya, kohya_layout
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.training import World, attach, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd_world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        # Where SDXL's own checkpoint has these layers ("model.diffusion_model." + dots).
        ("conv_in", "input_blocks_0_0"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks_1_0_in_layers_2"),
        ("down_blocks.0.resnets.1.conv2", "input_blocks_2_0_out_layers_3"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks_4_0_skip_connection"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        ("mid_block.resnets.0.time_emb_proj", "middle_block_0_emb_layers_1"),
        (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
        ),
        ("mid_block.resnets.1.conv1", "middle_block_2_in_layers_2"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0",
            "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.attentions.0.proj_out", "output_blocks_3_1_proj_out"),
        ("up_blocks.2.resnets.2.conv1", "output_blocks_8_0_in_layers_2"),
        ("conv_out", "out_2"),
    ],
)
def test_sdxl_names(module, name):
    assert kohya_layout.sgm_name(module, layers_per_block=2) == name


def test_a_layer_without_a_name():
    with pytest.raises(kohya.NotInKohyasLayout, match=r"down_blocks\.0\.motion_modules"):
        kohya_layout.sgm_name("down_blocks.0.motion_modules.0.to_q", layers_per_block=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("world", {}),
        ("world", {"alpha": 12.0}),
        ("world", {"alpha": 1.0, "targets": "attention+ff"}),
        ("world", {"alpha": 8.0, "targets": "all-linear"}),
        ("world", {"alpha": 8.0, "rslora": True}),
        ("sd_world", {"alpha": 8.0, "targets": "attention+conv"}),
        ("world", {"alpha": 8.0, "targets": ["conv1", "conv2", "conv_shortcut", "to_q"]}),
        ("sd_world", {"alpha": 12.0, "targets": "all-linear"}),
        ("sd_world", {"alpha": 2.0, "targets": ["conv1", "conv2", "to_v"]}),
    ],
)
def test_diffusers_reads_the_policy_from_it(request, tmp_path, name, options):
    world: World = request.getfixturevalue(name)
    family = world.family()
    probe = export.probe(world.pairs(family), family)
    adapters = attach(family, moved=0.1, **options)
    with torch.no_grad():
        policy = export.predict(family, probe)
    first = export.save(adapters, tmp_path / "adapter", {})
    second = kohya.save(
        adapters.state_dict(),
        adapters.scale * adapters.rank,
        family,
        tmp_path / "kohya" / "mine.safetensors",
        {"recipe": "…"},
    )
    export.verify(adapters, family, first, probe)
    found = kohya.verify(family, second, probe)
    assert found.difference <= found.tolerance < 1e-4
    assert found.effect > 100 * found.tolerance
    # The first file's adapter is the one that is left, on.
    pipeline = family.pipeline()
    assert pipeline.get_list_adapters() == {"unet": [export.LOADED_NAME]}
    with torch.no_grad():
        torch.testing.assert_close(export.predict(family, probe), policy, rtol=0, atol=found.tolerance)


@pytest.mark.parametrize("name", ["world", "sd_world"])
def test_alpha_stands_beside_plain_weights(request, tmp_path, name):
    world: World = request.getfixturevalue(name)
    family = world.family()
    adapters = attach(family, moved=0.1, alpha=12.0)
    path = kohya.save(
        adapters.state_dict(),
        adapters.scale * adapters.rank,
        family,
        tmp_path / "mine.safetensors",
        {"base_model": "tiny"},
    )
    state, own = load_file(path), adapters.state_dict()
    layers = {key.split(".")[0] for key in state}
    assert len(state) == 3 * len(layers) == 3 * len(own) // 2
    assert all(state[f"{layer}.alpha"].item() == 12.0 for layer in layers)
    assert all(state[f"{layer}.lora_down.weight"].shape[0] == 4 for layer in layers)
    ups = {state[f"{layer}.lora_up.weight"].double().sum().item() for layer in layers}
    assert ups == {weight.double().sum().item() for key, weight in own.items() if ".lora_B." in key}
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["base_model"] == "tiny"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "12.0")
    assert header["ss_base_model_version"] == ("sdxl_base_v1-0" if name == "world" else "sd_v1")


@pytest.mark.parametrize("damage", ["strength", "missing"])
def test_a_file_that_is_read_as_another_adapter_is_removed(world, tmp_path, damage):
    family = world.family()
    probe = export.probe(world.pairs(family), family)
    adapters = attach(family, moved=0.1, alpha=12.0)
    first = export.save(adapters, tmp_path / "adapter", {})
    second = kohya.save(
        adapters.state_dict(), adapters.scale * adapters.rank, family, tmp_path / "mine.safetensors", {}
    )
    state = load_file(second)
    if damage == "strength":  # what the common converter writes: alpha = rank
        state |= {key: torch.tensor(4.0) for key in state if key.endswith(".alpha")}
    else:
        del state[next(key for key in state if key.endswith("lora_up.weight"))]
    save_file(state, second)
    export.verify(adapters, family, first, probe)
    said: list[str] = []
    assert kohya.keep_if_same(family, second, probe, said.append) is None
    assert not second.exists()
    assert ("differ from the trained" if damage == "strength" else "can't read") in said[0]
    assert family.pipeline().get_list_adapters() == {"unet": [export.LOADED_NAME]}
