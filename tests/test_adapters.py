"""LoRA on a frozen denoiser: policy and reference in one network."""

from __future__ import annotations

import pytest
import torch

from lora_dpo.adapters import Adapters, target_names
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.recompute import recompute
from tests.support.training import World, attach, make_world, stream


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def family(world):
    return world.family()


@pytest.fixture
def predict(world, family):
    part = stream(world.pairs(family), family).batch(0).parts()
    draw = next(part)
    x_t = family.schedule.add_noise(draw.x_0_winner, draw.noise, draw.t)
    return lambda: family.predict(x_t, draw.t, draw.conditioning_winner)


def test_policy_starts_as_the_reference_bit_for_bit(family, predict):
    with torch.no_grad():
        base = predict()
        adapters = attach(family)
        policy = predict()
        with adapters.reference():
            reference = predict()
    assert torch.equal(policy, base)
    assert torch.equal(reference, base)


def test_reference_is_the_base_after_training_and_detach_leaves_it(family, predict):
    attributes, names = set(vars(family.denoiser)), list(family.denoiser.state_dict())
    with torch.no_grad():
        base = predict()
        adapters = attach(family)
        start = adapters.state_dict()
    optimizer = torch.optim.AdamW(adapters.parameters().values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        predict().square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        policy = predict()
        with adapters.reference():
            reference = predict()
        adapters.detach()
        detached = predict()
    assert not torch.equal(policy, base)
    assert all(not torch.equal(weight, start[name]) for name, weight in adapters.state_dict().items())
    assert torch.equal(reference, base)
    assert torch.equal(detached, base)
    assert set(vars(family.denoiser)) == attributes
    assert list(family.denoiser.state_dict()) == names


def test_reference_is_restored_on_exceptions_and_nests(family, predict):
    adapters = attach(family, moved=0.1)
    with torch.no_grad():
        policy = predict()
        with pytest.raises(ZeroDivisionError), adapters.reference():
            raise ZeroDivisionError
        assert torch.equal(predict(), policy)
        with adapters.reference():
            with adapters.reference():
                inner = predict()
            outer = predict()
        assert torch.equal(inner, outer)
        assert not torch.equal(outer, policy)
        assert torch.equal(predict(), policy)


def test_only_adapter_weights_are_trainable(family):
    adapters = attach(family)
    trainable = [p for p in family.denoiser.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapters.parameters().values()}
    with adapters.reference():
        pass
    assert all(p.requires_grad for p in adapters.parameters().values())


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_state(world):
    def state(seed: int, **options):
        return attach(world.family(), seed=seed, **options).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = state(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = state(7), state(8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    a = [name for name in first if ".lora_A." in name]
    assert a
    assert not any(torch.equal(first[name], other[name]) for name in a)
    # A layer's start depends on its own name only, not on which others are adapted.
    fewer = state(7, targets=["attn2.to_q"])
    assert 0 < len(fewer) < len(first)
    assert all(torch.equal(fewer[name], first[name]) for name in fewer)
    everything = torch.cat([first[name].flatten() for name in a])
    assert everything.std().item() == pytest.approx(1 / 4, rel=0.05)  # 1 / rank
    kaiming = state(7, init="kaiming")
    for name in a:
        bound = kaiming[name].shape[1] ** -0.5
        assert 0.7 * bound < kaiming[name].abs().max() <= bound


def test_weights_stay_float32_and_outputs_keep_the_precision_of_the_base(world):
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    adapters = Adapters.attach(layer, rank=2, alpha=2.0, targets=["0"], seed=0)
    assert {p.dtype for p in adapters.parameters().values()} == {torch.float32}
    assert layer(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_round_trip(world):
    trained = attach(world.family(), moved=0.1)
    state = trained.state_dict()
    other = attach(world.family(), seed=5)
    other.load_state_dict(state)
    assert list(other.state_dict()) == sorted(state, key=lambda name: (name.rsplit(".", 2)[0], name))
    assert all(torch.equal(weight, state[name]) for name, weight in other.state_dict().items())
    state[next(iter(state))].zero_()
    assert not torch.equal(trained.state_dict()[next(iter(state))], state[next(iter(state))])


def test_state_that_does_not_fit_is_refused_whole(family):
    adapters = attach(family)
    before = adapters.state_dict()
    missing, reshaped, *_ = before
    state = {name: torch.ones_like(weight) for name, weight in before.items()}
    del state[missing]
    state[reshaped] = torch.ones(1, 1)
    state["down.lora_A.weight"] = torch.ones(1)
    with pytest.raises(UserError) as error:
        adapters.load_state_dict(state)
    for text in (f"missing: {missing}", "unexpected: down.lora_A.weight", f"{reshaped}: shape (1, 1)"):
        assert text in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in adapters.state_dict().items())


def test_norm_is_zero_before_training_and_adapters_do_not_stack(family):
    assert attach(family).norm() == 0.0
    with pytest.raises(LoraDpoError, match="already"):
        attach(family)


@pytest.mark.parametrize("targets", ["attention", ["conv1", "to_q"]])
def test_norm_against_the_full_matrices(family, targets):
    adapters = attach(family, moved=0.3, alpha=6.0, targets=targets)
    weights = adapters.parameters()
    total = 0.0
    for name in weights:
        if ".lora_A." in name:
            b = weights[name.replace("lora_A", "lora_B")].flatten(1)
            total += (1.5 * b @ weights[name].flatten(1)).square().sum().item()
    assert adapters.norm() == pytest.approx(total**0.5, rel=1e-5)


def test_presets(family):
    unet = family.denoiser
    attention = target_names(unet, "attention")
    assert attention
    assert all(name.endswith(("to_q", "to_k", "to_v", "to_out.0")) for name in attention)
    more = target_names(unet, "attention+ff")
    assert set(attention) < set(more)
    assert any(name.endswith("ff.net.2") for name in more)
    linear = target_names(unet, "all-linear")
    assert set(linear) == {name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(attach(family, targets="all-linear").layers) == set(linear)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_kk"], "did you mean to_k"),
        (["q"], "selected by q"),
        (["re:nothing.*"], "selected by re:nothing"),
        (["re:(to_q"], "no regular expression"),
        ("atention", "attention, attention"),
        ([], "no targets"),
        (["attn1"], "no linear or convolution layer"),
    ],
)
def test_targets_that_match_nothing(family, targets, message):
    with pytest.raises(UserError, match=message):
        attach(family, targets=targets)


def test_gradient_checkpointing_gives_the_same_gradient(world):
    """It repeats the forward pass inside backward(): by then the reference scope must have been left."""

    def gradient(family, *, checkpointed: bool):
        part = next(stream(world.pairs(family), family).batch(0).parts())
        adapters = attach(family, moved=0.1, dropout=0.5)
        adapters.train()
        if checkpointed:
            assert recompute(family.denoiser, "full") > 0
        x_t = family.schedule.add_noise(part.x_0_winner, part.noise, part.t)
        with torch.no_grad(), adapters.reference():
            reference = family.predict(x_t, part.t, part.conditioning_winner)
        with part.dropout(adapters):
            policy = family.predict(x_t, part.t, part.conditioning_winner)
        (policy - reference).square().mean().backward()
        return {name: parameter.grad for name, parameter in adapters.parameters().items()}

    plain, repeated = (gradient(world.family(), checkpointed=on) for on in (False, True))
    for name, grad in plain.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(repeated[name], grad, rtol=1e-5, atol=1e-8)


CONVOLUTIONS = {"conv1", "conv2", "conv_shortcut", "conv"}


@pytest.mark.parametrize("plain", ["attention", "attention+ff", "all-linear"])
def test_conv_adds_the_convolutions_within_the_blocks(family, plain):
    without, added = (set(target_names(family.denoiser, preset)) for preset in (plain, f"{plain}+conv"))
    assert without < added
    modules = dict(family.denoiser.named_modules())
    expected = {
        name for name, module in modules.items()
        if isinstance(module, torch.nn.Conv2d) and name not in ("conv_in", "conv_out")
        and not name.endswith(("proj_in", "proj_out"))
    }  # fmt: skip
    assert added - without == expected
    assert {name.rpartition(".")[2] for name in expected} == CONVOLUTIONS


def test_the_recipes_presets_are_these():
    from typing import get_args

    from lora_dpo.adapters import PRESETS
    from lora_dpo.recipe_sections import Adapter

    literal = get_args(Adapter.model_fields["targets"].annotation)[0]
    assert set(get_args(literal)) == set(PRESETS)


def test_patterns_match_whole_names(family):
    found = target_names(family.denoiser, [r"re:mid_block\..*\.to_[qk]"])
    assert found
    assert all(name.startswith("mid_block.") and name[-4:] in ("to_q", "to_k") for name in found)
    assert target_names(family.denoiser, ["conv_in", *found]) == ["conv_in", *found]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_the_scale_is_what_the_update_is_multiplied_by(family, predict, rslora, scale):
    with torch.no_grad():
        adapters = attach(family, moved=0.1, alpha=12.0, rslora=rslora)
        assert adapters.scale == scale
        policy = predict()
        state = adapters.state_dict()
        adapters.detach()
        for name, module in family.denoiser.named_modules():
            if f"{name}.lora_A.weight" in state:
                a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
                module.weight += scale * b @ a
        torch.testing.assert_close(predict(), policy, rtol=1e-4, atol=1e-5)
