"""Activations computed again: the same gradient, less memory with every block more, and no option without an effect."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from lora_dpo import parts, recipe
from lora_dpo.adapters import Adapters
from lora_dpo.errors import UserError
from lora_dpo.methods.objectives import Dpo
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.progress import NoProgress
from lora_dpo.recompute import blocks, recompute
from tests.support.live_memory import LiveMemory
from tests.support.training import World, attach, make_world, stream


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """Of three widths, small but with activations that outweigh the rest."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    Adapters.attach(made, rank=2, alpha=2.0, seed=0)
    return made


def test_the_order_is_that_of_what_it_buys(unet):
    names = {id(module): name for name, module in unet.named_modules()}
    order = [names[id(block)] for block in blocks(unet)]
    kinds = ["transformer_blocks" in name for name in order]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) == 10
    assert order[0] == "down_blocks.0.attentions.0.transformer_blocks.0"
    widths = [block.dim for block in blocks(unet) if isinstance(block, BasicTransformerBlock)]
    assert widths == [16] * 3 + [32] * 3 + [64] * 4
    wide = [name for name in order if "transformer_blocks" in name][6:]
    stages = ["down", "mid", "up", "up"]  # among equals the earlier first
    assert [name.partition("_")[0] for name in wide] == stages


def peak(net: UNet2DConditionModel, policy) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes above the start, how many blocks, and the gradients of one pass."""
    count = recompute(net, policy)
    own = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in own:
        parameter.grad = None
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 4, 16, generator=generator)
    with LiveMemory() as memory:
        net(x, torch.tensor([1, 500]), encoder_hidden_states=text).sample.square().mean().backward()
    return memory.peak, count, [parameter.grad for parameter in own if parameter.grad is not None]


def test_every_block_more_lowers_the_peak_and_leaves_the_gradient(unet):
    every = len(blocks(unet))
    settings = ["none", 1, 3, 6, 10, "full"]
    found = {policy: peak(unet, policy) for policy in settings}
    assert [count for _, count, _ in found.values()] == [0, 1, 3, 6, 10, every]
    peaks = [size for size, _, _ in found.values()]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert peaks[-1] < 0.6 * peaks[0]
    for _, _, gradients in found.values():
        assert len(gradients) == len(found["none"][2]) > 0
        for got, want in zip(gradients, found["none"][2], strict=True):
            assert torch.equal(got, want)
    # What was chosen before is undone.
    assert peak(unet, "none")[0] == peaks[0]
    # Without a gradient nothing is computed again, and nothing kept.
    recompute(unet, "full")
    with torch.no_grad():
        assert not unet(torch.zeros(1, 4, 16, 16), 0, encoder_hidden_states=torch.zeros(1, 4, 16)).sample.requires_grad


def test_more_blocks_than_there_are_is_refused(unet):
    with pytest.raises(UserError, match=r"got 999, and this network has \d+ blocks"):
        recompute(unet, 999)
    with pytest.raises(UserError, match="this network has 0 blocks"):
        recompute(torch.nn.Linear(2, 2), "full")
    assert recompute(torch.nn.Linear(2, 2), "none") == 0


RECIPE = """
[data]
path = "{world.data}"
resolution = 64
[base]
family = "sdxl"
model = "{world.base}"
[method]
kind = "dpo"
"""


@pytest.mark.parametrize(("policy", "again"), [("none", 0), ("2", 2), ("full", None)])
def test_the_recipe_chooses(world, tmp_path, policy, again):
    (tmp_path / "small.toml").write_text(RECIPE.format(world=world))
    loaded = recipe.load(str(tmp_path / "small.toml"), [f"train.gradient_checkpointing={policy}"])
    family = world.family()
    adapters = parts.adapters(loaded, family, None, NoProgress().message)
    every = blocks(family.denoiser)
    calls = dict.fromkeys(map(id, every), 0)

    def count(module, *_):
        calls[id(module)] += 1

    for block in every:
        # Not a hook on the block: what is computed again goes around it.
        inner = next(iter(child for child in block.modules() if child is not block and not list(child.children())))
        inner.register_forward_pre_hook(lambda _module, _inputs, block=block: count(block))
    method = PairMethod(stream(world.pairs(family), family, batch_pairs=1), family, adapters, Dpo(1.0))
    method.backward(next(next(method.batches(0)).parts()))
    # Reference and policy, and again in backward; blocks before the first adapter have nothing to compute again.
    passes = [calls[id(block)] for block in every]
    assert set(passes) <= {2, 3}
    assert sum(times == 3 for times in passes) == (again if again is not None else len(every) - 2)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("true", r'\("full" is what true was\)'),
        ("false", r'\("none" is what false was\)'),
        ("0", 'got 0, expected "none", "full", "auto" or a number of blocks'),
        ("some", 'got "some", expected "none", "full", "auto" or a number of blocks'),
        ("2.5", "got 2.5"),
    ],
)
def test_other_words_are_refused(world, tmp_path, value, said):
    (tmp_path / "small.toml").write_text(RECIPE.format(world=world))
    with pytest.raises(UserError, match=said):
        recipe.load(str(tmp_path / "small.toml"), [f"train.gradient_checkpointing={value}"])


def test_a_run_may_change_it(world):
    """The gradient of the whole step, dropout included, is the same to the bit."""

    def gradient(policy):
        family = world.family()
        adapters = attach(family, moved=0.1, dropout=0.5)
        adapters.train()
        recompute(family.denoiser, policy)
        method = PairMethod(stream(world.pairs(family), family, batch_pairs=2), family, adapters, Dpo(100.0))
        method.backward(next(next(method.batches(0)).parts()))
        return [parameter.grad for parameter in adapters.parameters().values()]

    plain, some, full = (gradient(policy) for policy in ("none", 3, "full"))
    for got in (some, full):
        assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))
