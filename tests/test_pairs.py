"""The engine that trains every objective on pairs: what it measures, logs and remembers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from lora_dpo import denoising
from lora_dpo.errors import LoraDpoError
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.methods import losses
from lora_dpo.methods.objectives import Dpo, Objective, PairErrors
from lora_dpo.methods.pairs import PairMethod
from tests.support.toy import Run
from tests.support.training import World, attach, make_world, stream

BETA = 500.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Of v-prediction, where an error's space matters."""
    return make_world(tmp_path_factory.mktemp("sd"), StableDiffusion, prediction_type="v_prediction")


@dataclass(frozen=True)
class Everything(Objective):
    """Reads all that can be measured."""

    needs = frozenset({"loser", "reference", "shift", "overlap"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        shift = errors.shift_winner + 0.5 * errors.shift_loser
        return errors.winner - errors.loser + shift + errors.overlap * errors.winner + errors.ref_winner

    def logged(self, errors: PairErrors) -> dict[str, torch.Tensor]:
        return {"twice": 2 * errors.ref_loser}


@dataclass(frozen=True)
class Adaptive(Objective):
    """DPO whose β follows the margin of the step before, as an adaptive one would."""

    needs = frozenset({"loser", "reference"})

    beta: float

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return losses.dpo(*errors.four, self.beta)

    def margin(self, errors: PairErrors) -> torch.Tensor:
        return losses.margin(*errors.four, self.beta)

    def logged(self, errors: PairErrors) -> dict[str, torch.Tensor]:
        return {"beta": torch.full_like(errors.winner, self.beta)}

    def after(self, line):
        return replace(self, beta=0.9 * self.beta + 10 * abs(line["margin"]))


@dataclass(frozen=True)
class Greedy(Objective):
    needs = frozenset({"loser"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return errors.winner - errors.ref_winner


def test_what_is_measured(world):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=0.2)
    part = next(stream(pairs, family, batch_pairs=3).batch(0).parts())
    with torch.no_grad():
        got = PairMethod(stream(pairs, family), family, adapters, Everything()).loss(part)
        x_t = [family.schedule.add_noise(x_0, part.noise, part.t) for x_0 in (part.x_0_winner, part.x_0_loser)]
        sides = list(zip(x_t, (part.conditioning_winner, part.conditioning_loser), strict=True))
        policy = [family.predict(x, part.t, c) for x, c in sides]
        with adapters.reference():
            reference = [family.predict(x, part.t, c) for x, c in sides]
    target = [family.schedule.target(x_0, part.noise, part.t) for x_0 in (part.x_0_winner, part.x_0_loser)]
    weight = family.schedule.alphas_cumprod[part.t]
    assert weight.max() < 0.999

    def mean(one, other):
        return (one * other).mean(dim=(1, 2, 3)) * weight

    winner, loser = (mean(p - y, p - y) for p, y in zip(policy, target, strict=True))
    shift = [mean(p - r, p - r) for p, r in zip(policy, reference, strict=True)]
    ref_winner, ref_loser = (mean(r - y, r - y) for r, y in zip(reference, target, strict=True))
    overlap = mean(policy[0] - target[0], policy[1] - target[1])
    assert min(value.abs().min().item() for value in (*shift, overlap)) > 1e-6
    expected = winner - loser + shift[0] + 0.5 * shift[1] + overlap * winner + ref_winner
    torch.testing.assert_close(got.per_pair, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sums["overlap"], overlap.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sums["shift_loser"], shift[1].sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.sums["twice"], 2 * ref_loser.sum(), rtol=1e-4, atol=1e-6)
    # The product of the residual and the move follows from the three.
    product = mean(policy[0] - target[0], policy[0] - reference[0])
    torch.testing.assert_close((winner + shift[0] - ref_winner) / 2, product, rtol=1e-3, atol=1e-6)
    assert "margin" not in got.sums


def test_only_what_is_asked_for_may_be_read(world):
    family = world.family()
    pairs = world.pairs(family)
    method = PairMethod(stream(pairs, family), family, attach(family), Greedy())
    with pytest.raises(AttributeError, match="ref_winner was not measured"):
        method.loss(next(next(method.batches(0)).parts()))
    with pytest.raises(LoraDpoError, match="no such measurement: winer"):
        PairErrors(winer=torch.zeros(1))


def test_a_timestep_weight_multiplies_the_margin(world):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=0.2)
    part = next(stream(pairs, family).batch(0).parts())

    weights = 1 + torch.arange(1000) / 500
    with torch.no_grad():
        plain = PairMethod(stream(pairs, family), family, adapters, Dpo(BETA)).loss(part)
        got = PairMethod(stream(pairs, family), family, adapters, Dpo(BETA), timestep_weights=weights).loss(part)
    u = torch.log(torch.expm1(plain.per_pair.double()))  # −u of −log σ(u)
    expected = torch.nn.functional.softplus(u * weights[part.t].double())
    torch.testing.assert_close(got.per_pair.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_adaptive_objective_goes_on_where_it_was(tmp_path):
    """Its state follows from the metrics, so that a resumed run is the uninterrupted one, bit for bit."""

    def run(directory, steps):
        run = Run(tmp_path / directory, dropout=0.1)
        run.method = PairMethod(run.method._stream, run.family, run.adapters, Adaptive(200.0))
        return run, run.train(steps)

    whole, _ = run("whole", 6)
    run("parts", 3)
    resumed, result = run("parts", 6)
    assert result.resumed_from == 3
    assert resumed.method.objective == whole.method.objective != Adaptive(200.0)
    ours, theirs = whole.adapters.state_dict(), resumed.adapters.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # Going back starts over, whatever it has seen meanwhile.
    whole.method.restart([])
    assert whole.method.objective == Adaptive(200.0)


def test_errors_are_means_of_residuals(world):
    family = world.family()
    part = next(stream(world.pairs(family), family).batch(0).parts())
    arguments = (family, part.x_0_winner, part.noise, part.t, part.conditioning_winner)
    with torch.no_grad():
        residual = denoising.residuals(*arguments)
        expected = residual.square().mean(dim=(1, 2, 3)) * family.schedule.epsilon_weight(part.t)
        assert torch.equal(denoising.errors(*arguments), expected)
