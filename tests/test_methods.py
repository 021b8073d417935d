"""The stream of draws, and what the methods make of it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from lora_dpo import denoising
from lora_dpo.errors import UserError
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods import Method, losses
from lora_dpo.methods.objectives import Dpo, Sft
from lora_dpo.methods.pairs import PairMethod
from tests.support.training import PAIRS, World, attach, make_world, stream

BETA = 500.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def v_world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion, prediction_type="v_prediction")


@pytest.fixture(params=["sdxl", "sd_v"])
def any_world(request, world, v_world) -> World:
    return world if request.param == "sdxl" else v_world


@pytest.fixture
def family(world):
    return world.family()


@pytest.fixture
def pairs(world, family):
    return world.pairs(family)


def flat(part) -> dict[str, torch.Tensor]:
    named = {name: getattr(part, name) for name in ("x_0_winner", "x_0_loser", "noise", "t")}
    named |= {f"w {name}": value for name, value in part.conditioning_winner.items()}
    return named | {f"l {name}": value for name, value in part.conditioning_loser.items()}


def gradient(method: Method, adapters, batch, micro_batch_pairs) -> tuple[dict[str, torch.Tensor], float]:
    for parameter in adapters.parameters().values():
        parameter.grad = None
    total = 0.0
    for part in batch.parts(micro_batch_pairs):
        parts = method.loss(part)
        parts.loss.backward()
        total += parts.loss.item()
    return {name: parameter.grad.clone() for name, parameter in adapters.parameters().items()}, total


def test_every_epoch_visits_every_pair_once(pairs, family):
    taken = stream(pairs, family, batch_pairs=3)
    seen = [(i, v) for step in range(PAIRS) for i, v in zip(*places(taken.batch(step)), strict=True)]
    assert Counter(seen) == Counter({(index, visit): 1 for index in range(PAIRS) for visit in range(3)})
    orders = [[index for index, visit in seen if visit == epoch] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def places(batch) -> tuple[list[int], list[int]]:
    return batch.indices, batch.visits


def test_a_step_is_a_function_of_its_number(pairs, family):
    walked = iter(stream(pairs, family).batches(0))
    fourth = [next(walked) for _ in range(4)][3]
    jumped = next(stream(pairs, family).batches(3))
    assert fourth.step == jumped.step == 3
    one, two = (flat(next(batch.parts())) for batch in (fourth, jumped))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    # A far step costs no replay.
    assert len(stream(pairs, family).batch(10**9)) == 8
    other = flat(next(stream(pairs, family, seed=1).batch(3).parts()))
    assert not torch.equal(other["noise"], one["noise"])


def test_draws_belong_to_the_pair_and_not_to_the_batch(pairs, family):
    taken = stream(pairs, family)
    together = flat(taken.part([4, 2, 7], [0, 3, 1], batch_pairs=3))
    alone = flat(taken.part([2], [3], batch_pairs=1))
    assert all(torch.equal(value, together[name][1:2]) for name, value in alone.items())
    later = flat(taken.part([2], [4], batch_pairs=1))
    assert not torch.equal(later["noise"], alone["noise"])
    assert not torch.equal(later["x_0_winner"], alone["x_0_winner"])


def test_draws_do_not_touch_the_global_state(pairs, family):
    before = torch.get_rng_state()
    next(stream(pairs, family).batch(0).parts())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_part_may_be_smaller(pairs, family):
    parts = list(stream(pairs, family, batch_pairs=5).batch(0).parts(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert {part.batch_pairs for part in parts} == {5}


def test_visits_per_pair_bounds_the_draws(pairs, family):
    bounded = stream(pairs, family, batch_pairs=PAIRS, visits_per_pair=2)
    assert [set(bounded.batch(step).visits) for step in range(4)] == [{0}, {1}, {0}, {1}]
    free = stream(pairs, family, batch_pairs=PAIRS)
    assert [set(free.batch(step).visits) for step in range(4)] == [{0}, {1}, {2}, {3}]


def test_timesteps_are_uniform_over_the_range(pairs, family):
    def timesteps(**options) -> np.ndarray:
        drawn = stream(pairs, family, **options)
        return np.array([drawn.timestep(index, visit) for index in range(PAIRS) for visit in range(200)])

    everything = timesteps()
    counts, _ = np.histogram(everything, bins=10, range=(0, 1000))
    # 2,000 draws in 10 bins: χ² with 9 degrees of freedom is below 27.9 with probability .999.
    assert ((counts - 200) ** 2 / 200).sum() < 27.9
    some = timesteps(timestep_range=(100, 103))
    assert set(some.tolist()) == {100, 101, 102}


def test_stratified_timesteps_are_spread_over_a_step(pairs, family):
    """One pair in each of the step's equal parts of the range, in steps that cross epochs too."""
    spread = stream(pairs, family, timestep_sampling="stratified", timestep_range=(100, 900))
    for step in range(7):
        t = np.array([t for part in spread.batch(step).parts(3) for t in part.t.tolist()])
        assert sorted((t - 100) // 100) == list(range(8))
    alone = spread.batch(3)
    assert alone.only(slice(2, 3)).describe()[0]["timestep"] == int(next(alone.parts()).t[2])
    assert spread.draws != stream(pairs, family, timestep_range=(100, 900)).draws
    assert spread.draws != stream(pairs, family, batch_pairs=4, timestep_sampling="stratified").draws


def test_stratified_timesteps_are_uniform_for_every_pair(pairs, family):
    drawn = stream(pairs, family, timestep_sampling="stratified")
    t = np.array([[drawn.timestep(index, visit) for visit in range(200)] for index in range(PAIRS)])
    counts = np.stack([np.histogram(row, bins=5, range=(0, 1000))[0] for row in t])
    # 10 pairs with 4 degrees of freedom each: χ² with 40 is below 73.4 with probability .999.
    assert ((counts - 40) ** 2 / 40).sum() < 73.4


def test_stratified_draws_of_bounded_visits_are_those_of_the_visit(pairs, family):
    """What is stored of a pair's visit stays what it is in later epochs."""
    bounded = stream(pairs, family, timestep_sampling="stratified", visits_per_pair=2)
    seen: dict[tuple[str, int], int] = {}
    for step in range(12):
        for part in bounded.batch(step).parts():
            for key, visit, t in zip(part.keys, part.visits, part.t.tolist(), strict=True):
                assert seen.setdefault((key, visit), t) == t
    assert len(seen) == 2 * PAIRS


def test_strata_of_independent_images_are_independent(pairs, family):
    both = stream(pairs, family, timestep_sampling="stratified", independent_images=True)
    places = [
        (part.t.numpy() // 125, part.t_loser.numpy() // 125) for step in range(40) for part in both.batch(step).parts()
    ]
    assert all(sorted(side) == list(range(8)) for pair in places for side in pair)
    winners, losers = (np.concatenate(side) for side in zip(*places, strict=True))
    assert abs(np.corrcoef(winners, losers)[0, 1]) < 0.2


@pytest.mark.parametrize("wrong", [(0, 1001), (5, 5), (-1, 10)])
def test_timesteps_outside_the_schedule_are_refused(pairs, family, wrong):
    with pytest.raises(UserError, match=r"method\.timestep_range"):
        stream(pairs, family, timestep_range=wrong)


def test_caption_dropout_gives_the_empty_prompt(pairs, family):
    empty = pairs.conditioning([-1])["prompt_embeds"]

    def dropped(share: float) -> list[bool]:
        drawn = stream(pairs, family, caption_dropout=share)
        part = drawn.part(list(range(PAIRS)) * 8, [v for v in range(8) for _ in range(PAIRS)], batch_pairs=80)
        return [torch.equal(row, empty[0]) for row in part.conditioning_winner["prompt_embeds"]]

    assert not any(dropped(0.0))
    some = dropped(0.3)
    assert 0.15 < np.mean(some) < 0.45
    # A larger share drops the same visits and more: runs that differ in it are comparable.
    more = dropped(0.6)
    assert all(b for a, b in zip(some, more, strict=True) if a)
    assert sum(more) > sum(some)


def test_latents_are_posterior_samples(pairs, family):
    part = stream(pairs, family).part([3], [0], batch_pairs=1)
    pair = pairs.pair(3)
    unscaled = part.x_0_winner / 0.13025
    noise = (unscaled - pair.winner.mean) / pair.winner.std
    assert 0.85 < noise.std().item() < 1.15
    other = (part.x_0_loser / 0.13025 - pair.loser.mean) / pair.loser.std
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].item()) < 0.15
    assert torch.equal(part.conditioning_winner["time_ids"], pair.winner_geometry.float())


def test_first_step_of_dpo(any_world):
    """B = 0: margin exactly 0, loss ln 2 to float32, half of the gradient left."""
    family = any_world.family()
    pairs = any_world.pairs(family)
    adapters = attach(family)
    method = PairMethod(stream(pairs, family), family, adapters, Dpo(5000.0))
    part = next(next(method.batches(0)).parts())
    parts = method.loss(part)
    mean = {name: value.item() / len(part) for name, value in parts.sums.items()}
    assert torch.equal(parts.per_pair, torch.full((8,), math.log(2)))
    assert parts.loss.item() == mean["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert mean["margin"] == 0.0
    assert mean["implicit_accuracy"] == mean["gradient_factor"] == 0.5
    assert mean["error_winner"] == mean["ref_error_winner"]
    assert mean["error_loser"] == mean["ref_error_loser"]
    parts.loss.backward()
    grads = {name: parameter.grad for name, parameter in adapters.parameters().items()}
    # The gradient of A passes through B = 0.
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if ".lora_B." in name)
    assert all(grad.abs().max() == 0 for name, grad in grads.items() if ".lora_A." in name)


def test_dpo_loss_is_that_of_its_errors(any_world):
    family = any_world.family()
    pairs = any_world.pairs(family)
    adapters = attach(family, moved=0.2)
    part = next(stream(pairs, family).batch(0).parts())
    with torch.no_grad():
        got = PairMethod(stream(pairs, family), family, adapters, Dpo(BETA)).loss(part)
        sides = ((part.x_0_winner, part.conditioning_winner), (part.x_0_loser, part.conditioning_loser))
        policy = [denoising.errors(family, x_0, part.noise, part.t, c) for x_0, c in sides]
        with adapters.reference():
            reference = [denoising.errors(family, x_0, part.noise, part.t, c) for x_0, c in sides]
    torch.testing.assert_close(got.per_pair, losses.dpo(*policy, *reference, BETA), rtol=1e-3, atol=1e-3)
    u = losses.margin(*policy, *reference, BETA)
    assert u.abs().min() > 0.01
    assert got.sums["implicit_accuracy"].item() == (u > 0).sum().item()
    torch.testing.assert_close(got.sums["margin"], u.sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.sums["gradient_factor"], torch.sigmoid(-u).sum(), rtol=1e-3, atol=1e-3)
    for name, errors in zip(("error_winner", "error_loser"), policy, strict=True):
        torch.testing.assert_close(got.sums[name], errors.sum())


def test_dpo_gradient_is_the_closed_form(family, pairs):
    """∇ = Σ (β/2)·σ(−u)·(∇e_w − ∇e_l) / pairs, from gradients of the errors alone."""
    adapters = attach(family, moved=0.2)
    method = PairMethod(stream(pairs, family), family, adapters, Dpo(BETA))
    batch = next(method.batches(0))
    got, _ = gradient(method, adapters, batch, None)
    part = next(batch.parts())
    with torch.no_grad(), adapters.reference():
        ref_w = denoising.errors(family, part.x_0_winner, part.noise, part.t, part.conditioning_winner)
        ref_l = denoising.errors(family, part.x_0_loser, part.noise, part.t, part.conditioning_loser)
    e_w = denoising.errors(family, part.x_0_winner, part.noise, part.t, part.conditioning_winner)
    e_l = denoising.errors(family, part.x_0_loser, part.noise, part.t, part.conditioning_loser)
    with torch.no_grad():
        weight = BETA / 2 * torch.sigmoid(BETA / 2 * ((e_w - ref_w) - (e_l - ref_l)))
    own = list(adapters.parameters().values())
    expected = torch.autograd.grad((weight * (e_w - e_l)).sum() / len(part), own)
    largest = max(grad.abs().max().item() for grad in expected)
    for grad, want in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_micro_batches_give_the_same_gradient(family, pairs, kind):
    adapters = attach(family, moved=0.1)
    drawn = stream(pairs, family)
    method = PairMethod(drawn, family, adapters, Dpo(BETA) if kind == "dpo" else Sft())
    batch = next(method.batches(0))
    whole, loss = gradient(method, adapters, batch, 8)
    largest = max(grad.abs().max().item() for grad in whole.values())
    for size in (1, 2, 3):
        parts, total = gradient(method, adapters, batch, size)
        assert total == pytest.approx(loss, rel=1e-4)
        for name, grad in whole.items():
            torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=2e-5 * largest)


def test_sft_is_the_denoising_error_of_the_winners(family, pairs):
    adapters = attach(family, moved=0.1)
    method = PairMethod(stream(pairs, family), family, adapters, Sft())
    part = next(next(method.batches(0)).parts())
    got = method.loss(part)
    x_t = family.schedule.add_noise(part.x_0_winner, part.noise, part.t)
    predicted = family.predict(x_t, part.t, part.conditioning_winner)
    plain = torch.nn.functional.mse_loss(predicted, part.noise)
    torch.testing.assert_close(got.loss, plain)
    assert set(got.sums) == {"loss", "error_winner"}


def test_methods_share_their_draws(family, pairs):
    """A baseline that differs in its method only sees the same pairs, timesteps and noise."""
    adapters = attach(family)
    by_dpo = next(PairMethod(stream(pairs, family), family, adapters, Dpo(1.0)).batches(2))
    by_sft = next(PairMethod(stream(pairs, family), family, adapters, Sft()).batches(2))
    one, two = flat(next(by_dpo.parts())), flat(next(by_sft.parts()))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_v_errors_in_epsilon_space(v_world):
    """An ε recovered from v has α_t² times v's squared error."""
    family = v_world.family()
    part = next(stream(v_world.pairs(family), family).batch(0).parts())
    x_0, noise, t, conditioning = part.x_0_winner, part.noise, part.t, part.conditioning_winner
    with torch.no_grad():
        in_epsilon = denoising.errors(family, x_0, noise, t, conditioning)
        in_v = denoising.errors(family, x_0, noise, t, conditioning, "prediction")
        x_t = family.schedule.add_noise(x_0, noise, t)
        v = family.predict(x_t, t, conditioning)
    squared = family.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    recovered = squared.sqrt() * v + (1 - squared).sqrt() * x_t
    torch.testing.assert_close(in_epsilon, (recovered - noise).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(in_v * squared.flatten(), in_epsilon)


def test_adapter_dropout_is_in_the_policy_pass_only_and_repeats(world):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=0.2, dropout=0.5)
    method = PairMethod(stream(pairs, family), family, adapters, Dpo(BETA))
    part = next(next(method.batches(0)).parts())
    with torch.no_grad():
        off = method.loss(part)
        adapters.train()
        torch.manual_seed(3)
        one = method.loss(part)
        after = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(after, torch.rand(1))  # the pass left the global state as it was
        two = method.loss(part)
    assert torch.equal(one.per_pair, two.per_pair)
    assert not torch.equal(one.per_pair, off.per_pair)
    assert torch.equal(one.sums["ref_error_winner"], off.sums["ref_error_winner"])
