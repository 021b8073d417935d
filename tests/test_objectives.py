"""Every objective in the engine: its first step, its gradient, what it remembers, and the recipe that asks for it."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from lora_dpo import denoising, parts, recipe, recipe_methods
from lora_dpo.families.schedule import Schedule
from lora_dpo.methods import losses, objectives
from lora_dpo.methods.objectives import Objective, PairErrors
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.recipe_errors import RecipeError
from lora_dpo.recipe_toml import find, shipped_names
from tests.support.models import save_random_pairs
from tests.support.toy import Run
from tests.support.training import World, attach, make_world, stream

ROOT = Path(__file__).parents[1]
BETA = 500.0
ALL: dict[str, Objective] = {
    "dpo": objectives.Dpo(BETA),
    "cdpo": objectives.Dpo(BETA, label_smoothing=0.1),
    "robust": objectives.Dpo(BETA, label_noise=0.2),
    "safeguard": objectives.Dpo(BETA, safeguard=0.9),
    "anchor": objectives.Dpo(BETA, anchor_weight=0.5),
    "sft_term": objectives.Dpo(BETA, sft_weight=0.1),
    "ipo": objectives.Ipo(BETA),
    "hinge": objectives.Hinge(BETA),
    "dmpo": objectives.Dmpo(BETA),
    "kto": objectives.Kto(BETA, reference_point=1e-3),
    "mapo": objectives.Mapo(),
    "dspo": objectives.Dspo(BETA, strength=0.5),
    "sft": objectives.Sft(),
}
# What a pair costs where the policy is the reference.
AT_THE_START = {
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "robust": math.log(2),
    "safeguard": math.log(2),
    "anchor": math.log(2),
    "ipo": 0.25,
    "hinge": 1.0,
    "dmpo": -0.5 * math.log(4 * 0.99 * 0.01),
    "kto": 0.5,
}
SHIPPED = [name for name in shipped_names() if name.startswith("objectives/")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("sdxl"))


def setting(world: World, objective: Objective, *, moved: float = 0.0, pair_pass: Literal["plain", "split"] = "plain"):
    family = world.family()
    pairs = world.pairs(family)
    adapters = attach(family, moved=moved)
    independent = isinstance(objective, objectives.Kto)
    drawn = stream(pairs, family, independent_images=independent)
    return PairMethod(drawn, family, adapters, objective, pair_pass=pair_pass), adapters


def gradients(method: PairMethod, adapters, micro_batch_pairs: int | None) -> tuple[torch.Tensor, float]:
    for parameter in adapters.parameters().values():
        parameter.grad = None
    found = [method.backward(part).loss.item() for part in method._stream.batch(0).parts(micro_batch_pairs)]
    return torch.cat([p.grad.flatten() for p in adapters.parameters().values()]), sum(found)


@pytest.mark.parametrize("name", AT_THE_START)
def test_the_first_step(world, name):
    objective = replace(ALL[name], reference_point=0.0) if name == "kto" else ALL[name]
    method, _ = setting(world, objective)
    with torch.no_grad():
        got = method.loss(next(method._stream.batch(0).parts()))
    assert got.per_pair.tolist() == pytest.approx([AT_THE_START[name]] * 8, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_does_not_depend_on_the_micro_batch(world, name):
    method, adapters = setting(world, ALL[name], moved=0.1)
    whole, loss = gradients(method, adapters, None)
    assert whole.abs().max() > 0
    for size in (1, 3):
        some, total = gradients(method, adapters, size)
        assert total == pytest.approx(loss, rel=1e-3)
        torch.testing.assert_close(some, whole, rtol=2e-3, atol=5e-5 * whole.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_one_image_at_a_time_gives_the_same_gradient(world, name):
    whole, loss = gradients(*setting(world, ALL[name], moved=0.1), None)
    split, total = gradients(*setting(world, ALL[name], moved=0.1, pair_pass="split"), None)
    assert total == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(split, whole, rtol=2e-3, atol=5e-5 * whole.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_every_objective_trains(tmp_path, name):
    run = Run(tmp_path)
    run.method = PairMethod(run.method._stream, run.family, run.adapters, ALL[name])
    before = run.adapters.state_dict()
    result = run.train(4)
    assert result.steps == 4
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert any(not torch.equal(value, before[key]) for key, value in run.adapters.state_dict().items())


def test_the_safeguards_gradient_is_the_winners_and_a_share_of_the_losers(world):
    """∇ = Σ (β/2)·σ(−u)·(∇e_w − λ∇e_l)/pairs, from gradients of the errors alone."""
    method, adapters = setting(world, objectives.Dpo(BETA, safeguard=0.9), moved=0.1)
    got, _ = gradients(method, adapters, None)
    part, family = next(method._stream.batch(0).parts()), method._family
    with torch.no_grad(), adapters.reference():
        ref = [denoising.errors(family, x, part.noise, part.t, c) for x, c in sides(part)]
    residual = [denoising.residuals(family, x, part.noise, part.t, c) for x, c in sides(part)]
    e_w, e_l = (r.square().mean(dim=(1, 2, 3)) for r in residual)
    with torch.no_grad():
        share = losses.safeguard(e_w, (residual[0] * residual[1]).mean(dim=(1, 2, 3)), 0.9)
        weight = BETA / 2 * torch.sigmoid(-losses.margin(e_w, e_l, *ref, BETA))
    assert share.min() < 0.5
    own = list(adapters.parameters().values())
    expected = torch.autograd.grad((weight * (e_w - share * e_l)).sum() / len(part), own)
    flat = torch.cat([grad.flatten() for grad in expected])
    torch.testing.assert_close(got, flat, rtol=1e-3, atol=1e-4 * flat.abs().max().item())
    with torch.no_grad():
        assert method.loss(part).sums["loser_gradient"].item() == pytest.approx(share.sum().item(), rel=1e-4)


def sides(part):
    return ((part.x_0_winner, part.conditioning_winner), (part.x_0_loser, part.conditioning_loser))


@dataclass(frozen=True)
class Alternative(Objective):
    """What a recipe can't ask for."""

    needs = frozenset({"loser", "reference", "shift"})

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return losses.alternative(errors.shift_winner, errors.shift_loser, BETA)


def test_the_alternative_objective_never_starts(world):
    """Exactly zero for every weight of a fresh LoRA, on a true UNet; moved away from there it has a gradient."""
    assert gradients(*setting(world, Alternative()), None)[0].abs().max() == 0
    assert gradients(*setting(world, Alternative(), moved=0.1), None)[0].abs().max() > 0


def test_images_of_kto_have_draws_of_their_own(world):
    family = world.family()
    pairs = world.pairs(family)
    shared = next(stream(pairs, family).batch(0).parts())
    assert shared.noise_loser is shared.noise
    assert shared.t_loser is shared.t
    own = stream(pairs, family, independent_images=True)
    part = next(own.batch(0).parts())
    assert torch.equal(part.noise, shared.noise)
    assert torch.equal(part.t, shared.t)
    assert (part.t_loser != part.t).sum() >= 6
    assert abs(np.corrcoef(part.noise.flatten(), part.noise_loser.flatten())[0, 1]) < 0.05
    alone = own.part(own.batch(0).indices[2:3], own.batch(0).visits[2:3], batch_pairs=8)
    assert torch.equal(alone.noise_loser, part.noise_loser[2:3])
    assert torch.equal(alone.t_loser, part.t_loser[2:3])
    assert [d["timestep_loser"] for d in own.batch(0).describe()] == part.t_loser.tolist()
    assert "timestep_loser" not in stream(pairs, family).batch(0).describe()[0]


def test_kto_measures_each_image_at_its_own_draw(world):
    method, adapters = setting(world, objectives.Kto(BETA, reference_point=2e-3), moved=0.2)
    part, family = next(method._stream.batch(0).parts()), method._family
    with torch.no_grad():
        got = method.loss(part)
        draws = ((part.noise, part.t), (part.noise_loser, part.t_loser))

        def errors():
            return [denoising.errors(family, x, *draw, c) for (x, c), draw in zip(sides(part), draws, strict=True)]

        policy = errors()
        with adapters.reference():
            reference = errors()
    gain_w, gain_l = ((r - e).double() for r, e in zip(reference, policy, strict=True))
    expected = torch.sigmoid(-BETA / 2 * (gain_w - 2e-3)) / 2 + torch.sigmoid(BETA / 2 * (gain_l - 2e-3)) / 2
    torch.testing.assert_close(got.per_pair.double(), expected, rtol=1e-3, atol=1e-4)


def test_ktos_reference_point_is_the_last_steps_mean_gain():
    line = {"error_winner": 0.2, "ref_error_winner": 0.3, "error_loser": 0.5, "ref_error_loser": 0.44}
    fresh = objectives.Kto(BETA)
    assert fresh.reference_point == 0.0
    assert fresh.after(line).reference_point == pytest.approx((0.1 - 0.06) / 2)
    assert fresh.after(line | {"error_winner": 0.4}).reference_point == 0.0


def test_auto_beta_follows_the_gap():
    start = parts.objective(recipe_methods.Dpo(kind="dpo", beta="auto"))
    assert isinstance(start, objectives.Dpo)
    assert start.beta == losses.AUTO_BETA_RANGE[1]
    assert start.after({"gap": 0.0}) == start
    one = start.after({"gap": 1e-3})
    assert one.gap == 1e-3
    assert one.beta == pytest.approx(-2 * math.log(0.25) / 1e-3)
    two = one.after({"gap": 2e-3})
    assert two.gap == pytest.approx(0.99e-3 + 0.02e-3)
    fixed = objectives.Dpo(BETA)
    assert fixed.after({"gap": 1.0}) is fixed


@pytest.mark.parametrize(
    "objective", [objectives.Kto(20.0, undesirable_weight=0.02), objectives.Dpo(5e4, auto=True)], ids=["kto", "auto"]
)
def test_what_an_objective_remembers_survives_a_resume(tmp_path, objective):
    """Bit for bit, with micro-batches, from the metrics of the steps before."""

    def run(directory: str, steps: int, **options):
        made = Run(tmp_path / directory)
        made.method = PairMethod(made.method._stream, made.family, made.adapters, objective)
        return made, made.train(steps, **options)

    whole, _ = run("whole", 6)
    run("parts", 3)
    resumed, result = run("parts", 6)
    assert result.resumed_from == 3
    assert resumed.method.objective == whole.method.objective
    assert all(torch.equal(v, resumed.adapters.state_dict()[k]) for k, v in whole.adapters.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    name = "reference_point" if isinstance(objective, objectives.Kto) else "beta"
    assert len({line[name] for line in lines}) > 1
    # Steps of one micro-batch come to the same, to rounding.
    other, _ = run("other", 6, micro_batch_pairs=None)
    torch.testing.assert_close(
        torch.cat([v.flatten() for v in other.adapters.state_dict().values()]),
        torch.cat([v.flatten() for v in whole.adapters.state_dict().values()]),
        rtol=1e-2,
        atol=1e-4,
    )


def test_a_ties_label_reaches_the_loss(tmp_path_factory):
    """From the rows of a file through the cache, opened anew, to the loss and the metrics."""
    made = make_world(tmp_path_factory.mktemp("ties"))
    world = replace(made, data=save_random_pairs(made.data.with_name("ties.parquet"), 10, ties=4))
    family = world.family()
    world.pairs(family, ties="half")
    pairs = world.pairs(family, ties="half")
    assert sorted(pairs.pair(index).label for index in range(len(pairs))) == [0.5] * 4 + [1.0] * 6
    assert len(world.pairs(family)) == 6
    adapters = attach(family, moved=0.2)
    method = PairMethod(stream(pairs, family), family, adapters, objectives.Dpo(BETA))
    part = next(method._stream.batch(0).parts())
    assert 0 < (part.label == 0.5).sum() < 8
    assert part.pair(3).label.item() == part.label[3].item()
    with torch.no_grad():
        got = method.loss(part)
        decided = method.loss(replace(part, label=torch.ones(8)))
    # −log σ(u) for a winner, and the mean of both directions for a tie.
    u = -torch.log(torch.expm1(decided.per_pair.double()))
    expected = torch.nn.functional.softplus(-u) + (1 - part.label) * u
    torch.testing.assert_close(got.per_pair.double(), expected, rtol=1e-3, atol=1e-4)
    right = (part.label == 1) & (u > 0)
    assert got.sums["implicit_accuracy"].item() == right.sum().item() + 0.5 * (part.label == 0.5).sum().item()


# --- the recipe

OPTIONS = {
    "method.kind=dpo method.label_smoothing=0.1": objectives.Dpo(2000.0, label_smoothing=0.1),
    "method.kind=dpo method.label_noise=0.1": objectives.Dpo(2000.0, label_noise=0.1),
    "method.kind=ipo method.beta=300": objectives.Ipo(300.0),
    "method.kind=hinge method.safeguard=0.6": objectives.Hinge(2000.0, safeguard=0.6),
    "method.kind=dmpo method.alpha=0.2": objectives.Dmpo(2000.0, alpha=0.2),
    "method.kind=ipo method.anchor_weight=0.5 method.sft_weight=2": objectives.Ipo(
        2000.0, anchor_weight=0.5, sft_weight=2.0
    ),
    "method.kind=hinge method.beta=auto": objectives.Hinge(50_000.0, auto=True),
    "method.kind=kto method.desirable_weight=2 method.undesirable_weight=0.5": objectives.Kto(
        2000.0, desirable_weight=2.0, undesirable_weight=0.5
    ),
    "method.kind=mapo method.odds_weight=0.2 method.odds_scale=1": objectives.Mapo(0.2, 1.0, 1000),
    "method.kind=dspo method.strength=0.25": objectives.Dspo(2000.0, strength=0.25),
    "method.kind=sft": objectives.Sft(),
}
QUICK = "quickstart"


@pytest.mark.parametrize("arguments", OPTIONS)
def test_a_recipes_method_is_an_objective(arguments):
    """Every key arrives; that each has an effect on the loss, the next test says."""
    chosen = recipe.load(QUICK, arguments.split())
    if "beta" not in arguments:  # the quickstart's own
        chosen = recipe.load(
            QUICK, [*arguments.split(), *(["method.beta=2000"] if hasattr(chosen.method, "beta") else [])]
        )
    assert parts.objective(chosen.method) == OPTIONS[arguments]


EFFECTS = [
    (objectives.Dpo, {"beta": 100.0, "label_smoothing": 0.1, "label_noise": 0.1, "safeguard": 0.9, "sft_weight": 1.0}),
    (objectives.Ipo, {"beta": 100.0, "anchor_weight": 1.0}),
    (objectives.Hinge, {"beta": 100.0, "anchor_weight": 1.0}),
    (objectives.Dmpo, {"beta": 100.0, "alpha": 0.2}),
    (objectives.Kto, {"beta": 100.0, "desirable_weight": 2.0, "undesirable_weight": 2.0, "reference_point": 0.1}),
    (objectives.Mapo, {"odds_weight": 1.0, "odds_scale": 1.0, "timesteps": 10}),
    (objectives.Dspo, {"beta": 100.0, "strength": 0.5}),
]


@pytest.mark.parametrize(("kind", "changes"), EFFECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_parameter_has_an_effect_on_the_gradient(kind, changes):
    generator = torch.Generator().manual_seed(0)
    names = ("winner", "loser", "ref_winner", "ref_loser", "shift_winner", "shift_loser", "overlap")
    values = {name: torch.rand(8, generator=generator) * 0.1 for name in names}
    values |= {"t": torch.arange(8), "weight": torch.ones(8), "label": torch.ones(8)}
    start = kind() if kind is objectives.Mapo else kind(20.0)

    def slope(objective: Objective) -> torch.Tensor:
        measured = {n: v.clone().requires_grad_(n in ("winner", "loser")) for n, v in values.items()}
        objective(PairErrors(**measured)).sum().backward()
        return torch.cat([measured[n].grad for n in ("winner", "loser")])

    before = slope(start)
    for name, value in changes.items():
        assert not torch.allclose(slope(replace(start, **{name: value})), before, rtol=1e-4), name


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_of_the_folder_builds_its_method(world, name):
    """With the objective that it is named after, and nothing but the method changed."""
    loaded = recipe.load(name)
    assert {key.split(".")[0] for key in recipe.differences(find(QUICK), loaded)} <= {"method", "train", "data"}
    family = world.family()
    pairs = world.pairs(family)
    method = parts.method(loaded, pairs, family, attach(family, moved=0.1))
    with torch.no_grad():
        assert torch.isfinite(method.loss(next(next(method.batches(0)).parts(2))).loss)


def test_ties_are_trained_on_and_not_evaluated_on():
    halves = recipe.load(QUICK, ["data.ties=half"])
    kept = parts.source(halves, "train", 60)
    assert 0.5 in {pair.label for pair in kept}
    held_out = parts.source(halves, "heldout", 60)
    assert {pair.label for pair in held_out} == {1.0}
    assert held_out.report.dropped["tie"] > 0


def test_every_kind_has_a_recipe_in_the_folder():
    assert {recipe.load(name).method.kind for name in SHIPPED} == set(recipe_methods.METHODS)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_objectives", ROOT / "benchmarks" / "objectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_benchmark_tries_equally_many_settings_of_every_recipe(benchmark, tmp_path):
    assert {f"objectives/{name}" for name in benchmark.GRID} == set(SHIPPED)
    assert {len(settings) for settings in benchmark.GRID.values()} == {3}
    plan = benchmark.Plan(tmp_path, 2, 4, 8, 8, 10, 0)
    for name, settings in benchmark.GRID.items():
        made = [plan.recipe(name, setting) for setting in settings]
        assert len({(one.method, one.train) for one in made}) == 3


def test_the_benchmarks_tuning_prompts_are_in_no_split(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.preferences, "prompts", lambda plan: [])
    first = benchmark.tuning_prompts(20)
    assert len(set(first)) == 20
    monkeypatch.setattr(benchmark.preferences, "prompts", lambda plan: first[3:5])
    assert benchmark.tuning_prompts(18) == [*first[:3], *first[5:]]


def test_the_benchmarks_table_goes_between_its_marks(benchmark, tmp_path):
    interval = {"difference": 0.1, "ci95": [0.05, 0.15]}
    row = {"name": "ipo", "chosen": {"method.beta": "500"}, "win_rate": [0.7, 0.6, 0.8], "norm": 0.02}
    row |= {"score": interval, "strict": interval, "aesthetic": interval, "prediction_shift": 0.001, "ref_error": 0.1}
    row |= {"winner_rise": -0.001, "loser_rise": 0.002}
    text = benchmark.table([row])
    assert "| ipo | beta 500 | +0.100 [+0.050, +0.150] |" in text
    assert text.splitlines()[-1].endswith("| 1.00% | 2.00% | -1.00% | +2.00% |")
    assert len({line.count("|") for line in text.splitlines()}) == 1
    document = tmp_path / "objectives.md"
    document.write_text((ROOT / "docs" / "objectives.md").read_text("utf-8"), "utf-8")
    for _ in range(2):
        benchmark.put_into(document, text)
    assert document.read_text("utf-8").count("| ipo | beta 500 |") == 1


def test_timestep_weights_of_a_recipe_have_mean_one_over_its_range(world):
    def weights(*arguments: str) -> torch.Tensor | None:
        family = world.family()
        pairs = world.pairs(family)
        made = parts.method(recipe.load(QUICK, arguments), pairs, family, attach(family))
        assert isinstance(made, PairMethod)
        return made._timestep_weights

    assert weights() is None
    elbo, bounded = weights("method.timestep_weight=elbo"), weights("method.timestep_weight=min_snr")
    tighter = weights("method.timestep_weight=min_snr", "method.min_snr_gamma=1")
    part = weights("method.timestep_weight=elbo", "method.timestep_range=[100, 600]")
    assert elbo is not None
    assert part is not None
    assert elbo.mean().item() == pytest.approx(1)
    assert part[100:600].mean().item() == pytest.approx(1)
    raw = losses.timestep_weights(world.family().schedule.alphas_cumprod, "elbo")
    torch.testing.assert_close(elbo * raw.mean(), raw)
    assert not torch.equal(bounded, tighter)


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["method.kind=alternative"], "method.kind", "would never move"),
        (["method.kind=dop"], "method.kind", 'expected one of "dpo", "ipo"'),
        (["method.label_smoothing=0.1", "method.label_noise=0.1"], "method.label_noise", "not both"),
        (["method.label_noise=0.5"], "method.label_noise", "less than 0.5"),
        (["data.ties=half", "method.kind=kto"], "data.ties", "dpo, ipo, hinge, dmpo can do without"),
        (["method.min_snr_gamma=5"], "method.min_snr_gamma", 'not "min_snr"'),
        (["method.beta=big"], "method.beta", 'a number above 0, or "auto"'),
        (["method.beta=0"], "method.beta", 'a number above 0, or "auto"'),
        (["method.kind=kto", "method.beta=auto"], "method.beta", "number"),
        (["method.kind=sft", "method.safeguard=0.5"], "method.safeguard", "it belongs to dpo, ipo, hinge, dmpo"),
        (["method.alpha=0.1"], "method.alpha", "it belongs to dmpo"),
    ],
)
def test_contradictions_are_refused(arguments, key, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load(QUICK, arguments)
    found = {".".join(problem.key): problem.message for problem in caught.value.problems}
    assert message in found[key], found


def test_a_schedule_without_signal_at_the_end_can_be_weighed():
    alphas = Schedule({"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}).alphas_cumprod
    assert torch.isfinite(losses.timestep_weights(alphas, "elbo")).all()
