"""Every objective on the tiny world at equal compute: preference, alignment, look, and how far it left the base.

    python benchmarks/objectives.py --out docs/objectives.json --docs docs/objectives.md

Each recipe in `recipes/objectives/` is trained with each of its settings (`GRID`: as many for every objective), on
the same pairs, in the same order, with the same draws. The setting with the highest mean score on *tuning* prompts is
kept, and only that one is sampled on the held-out prompts of the table. Intervals are 95 %, over prompts. Training has
one seed each: what differs by less than another seed would change isn't told apart by them.

It resumes where it was stopped: runs, pictures and measurements are kept in `--work`. Prints the table and a last line
of JSON; `--docs` puts the table between the marks in that file.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from lora_dpo import __version__, atomic, build, denoising, inputs, parts, updates
from lora_dpo import recipe as recipes
from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPairs
from lora_dpo.evaluation.win_rate import Comparison, compare, compare_details
from lora_dpo.families import Family
from lora_dpo.methods.stream import PairStream
from lora_dpo.progress import NoProgress
from lora_dpo.randomness import numpy_generator
from lora_dpo.recipe import Recipe
from lora_dpo.recipe_toml import shipped_names
from lora_dpo.sampling import sample
from lora_dpo.scorers.tinyworld import TinyWorldScorer
from lora_dpo.tinyworld import preferences, scenes

FOLDER = "objectives/"
SCORER = TinyWorldScorer()
RATE, BETAS = "train.learning_rate", ("500", "1000", "2000")
# Three settings for every objective, tried on the tuning prompts: its β, or what it has in place of one.
GRID: dict[str, list[dict[str, str]]] = {
    **{
        name: [{"method.beta": beta} for beta in BETAS]
        for name in (
            "dpo", "cdpo", "robust", "ties", "ipo", "hinge", "dmpo", "safeguard", "anchor", "sft_term", "min_snr",
            "elbo",
        )
    },
    "kto": [{"method.beta": beta} for beta in ("2000", "4000", "8000")],
    "auto_beta": [{RATE: rate} for rate in ("5e-4", "1e-3", "1.5e-3")],
    "mapo": [{RATE: "1.5e-3"}, {RATE: "5e-4"}, {RATE: "1.5e-3", "method.odds_weight": "0.01"}],
    "dspo": [{RATE: "5e-4"}, {RATE: "1.5e-3"}, {RATE: "5e-4", "method.strength": "0.001"}],
    "sft": [{RATE: rate} for rate in ("1.5e-4", "5e-4", "1.5e-3")],
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What all objectives share."""

    work: Path
    steps: int
    batch_pairs: int
    prompts: int
    tuning_prompts: int
    sampler_steps: int
    seed: int

    def recipe(self, name: str, setting: Mapping[str, str]) -> Recipe:
        return recipes.load(
            f"{FOLDER}{name}",
            [
                f"train.steps={self.steps}",
                f"train.batch_pairs={self.batch_pairs}",
                f"train.seed={self.seed}",
                f"train.save_every_steps={self.steps}",
                "evaluate.prompts=0",
                "evaluate.implicit_pairs=0",
                *(f"{key}={value}" for key, value in setting.items()),
            ],
        )


def tuning_prompts(wanted: int) -> list[str]:
    """Captions of the grammar that are in neither split of the preference set."""
    taken = set(preferences.prompts(preferences.Plan()))
    found: dict[str, None] = {}
    index = 0
    while len(found) < wanted:
        caption = scenes.write(scenes.draw_facts(numpy_generator(0, "tuning prompt of the objectives", index)))
        index += 1
        if caption not in taken:
            found[caption] = None
    return list(found)


class Pictures:
    """The base's and the adapters' pictures of one set of prompts, drawn once and kept as files."""

    def __init__(self, plan: Plan, family: Family, name: str, prompts: list[str], guidance: float) -> None:
        self.plan, self.family, self.name, self.prompts, self.guidance = plan, family, name, prompts, guidance

    def of(self, directory: Path, adapter: Path | None) -> Tensor:
        file = directory / f"pictures-{self.name}.npz"
        about = json.dumps([self.prompts, self.plan.sampler_steps, self.guidance])
        if file.exists():
            with np.load(file) as held:
                if str(held["about"]) == about:
                    return torch.from_numpy(held["pictures"]).float() / 255
        pipeline: Any = self.family.pipeline()
        if adapter is not None:
            pipeline.load_lora_weights(adapter)
        try:
            drawn = sample(
                pipeline,
                self.prompts,
                [0] * len(self.prompts),
                steps=self.plan.sampler_steps,
                guidance=self.guidance,
                height=64,
                width=64,
                batch=64,
            )
        finally:
            if adapter is not None:
                pipeline.unload_lora_weights()
        pictures = (drawn.clamp(0, 1) * 255).round().byte()
        directory.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file.with_suffix(".tmp.npz"), pictures=pictures.numpy(), about=about)
        file.with_suffix(".tmp.npz").replace(file)
        return pictures.float() / 255


@torch.no_grad()
def shift(family: Family, adapters: Adapters, stream: PairStream, draws: int) -> dict[str, float]:
    """Means over held-out pairs and fixed draws: (ε_θ − ε_ref)², and what the errors of both sides rose by."""
    sums = {"prediction_shift": 0.0, "winner_rise": 0.0, "loser_rise": 0.0, "ref_error": 0.0}
    pairs = list(range(len(stream.pairs)))
    for visit in range(draws):
        for start in range(0, len(pairs), 64):
            part = stream.part(pairs[start : start + 64], [visit] * len(pairs[start : start + 64]), batch_pairs=1)
            sides = (
                ("winner_rise", part.x_0_winner, part.conditioning_winner),
                ("loser_rise", part.x_0_loser, part.conditioning_loser),
            )
            for name, x_0, conditioning in sides:
                with adapters.reference():
                    before = denoising.residuals(family, x_0, part.noise, part.t, conditioning)
                after = denoising.residuals(family, x_0, part.noise, part.t, conditioning)
                per_image = lambda r: r.square().mean(dim=(1, 2, 3)).sum().item()  # noqa: E731
                sums[name] += per_image(after) - per_image(before)
                sums["prediction_shift"] += per_image(after - before) / 2
                sums["ref_error"] += per_image(before) / 2
    return {name: value / (draws * len(pairs)) for name, value in sums.items()}


def relative_norm(family: Family, adapter: Path) -> float:
    """‖ΔW‖/‖W‖ over the layers that have an adapter, Frobenius."""
    change = base = 0.0
    weights = dict(family.denoiser.named_parameters())
    for module, update in updates.of_unet(*updates.load(adapter)).items():
        change += update.dense().square().sum().item()
        base += weights[f"{module}.weight"].detach().double().square().sum().item()
    return (change / base) ** 0.5


def train(plan: Plan, name: str, setting: Mapping[str, str]) -> tuple[Path, Recipe, dict[str, Any]]:
    recipe = plan.recipe(name, setting)
    run_dir = plan.work / name / short(setting).replace(" ", "")
    return run_dir, recipe, build.run(recipe, run_dir, quiet=True).result


def short(setting: Mapping[str, str]) -> str:
    return ", ".join(f"{key.split('.', 1)[1].replace('_', ' ')} {value}" for key, value in setting.items())


def measure(plan: Plan, name: str, shared: Shared) -> dict[str, Any]:
    """Tune, then measure the chosen setting on the held-out prompts."""
    tried = []
    for setting in GRID.get(name, [{}]):
        run_dir, recipe, result = train(plan, name, setting)
        adapter = run_dir / result["adapter"]
        score = SCORER(shared.tuning.of(run_dir, adapter), shared.tuning.prompts).mean().item()
        tried.append({"setting": setting, "tuning_score": score, "train_seconds": result["train_seconds"]})
        print(f"{name}, {short(setting)}: {score:.4f} on tuning prompts", flush=True)
    best = max(tried, key=lambda one: one["tuning_score"])
    run_dir, recipe, result = train(plan, name, best["setting"])
    adapter = run_dir / result["adapter"]
    pictures = shared.evaluation.of(run_dir, adapter)
    prompts = shared.evaluation.prompts
    overall = compare(SCORER(pictures, prompts), shared.base_scores, prompts, seed=0)
    details = compare_details(SCORER.details(pictures, prompts), shared.base_details, prompts, seed=0)
    found = {
        "name": name,
        "method": recipe.method.model_dump(mode="json", exclude_none=True),
        "chosen": best["setting"],
        "tried": tried,
        "train_seconds": result["train_seconds"],
        "win_rate": [overall.win_rate, *overall.ci95],
        "norm": relative_norm(shared.family, adapter),
        **{key: _row(c) for key, c in (("score", overall), *((k, details[k]) for k in ("strict", "aesthetic")))},
    }
    return found | shared.moved(adapter)


def _row(comparison: Comparison) -> dict[str, Any]:
    return {
        "base": comparison.mean_b,
        "adapted": comparison.mean_a,
        "difference": comparison.effect.mean,
        "ci95": list(comparison.effect.ci95),
    }


class Shared:
    """Made once for all objectives: the base, its pictures on both sets of prompts, and the held-out pairs."""

    def __init__(self, plan: Plan) -> None:
        recipe = plan.recipe("dpo", {})
        self.family = parts.family(recipe, torch.device("cpu"))
        self.pairs = self._held_out(recipe)
        guidance = recipe.evaluate.guidance
        chosen = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"prompts": plan.prompts})})
        self.evaluation = Pictures(plan, self.family, "heldout", inputs.prompts(chosen, None), guidance)
        self.tuning = Pictures(plan, self.family, "tuning", tuning_prompts(plan.tuning_prompts), guidance)
        base = self.evaluation.of(plan.work / "base", None)
        self.base_scores = SCORER(base, self.evaluation.prompts)
        self.base_details = SCORER.details(base, self.evaluation.prompts)
        tuning = self.tuning.of(plan.work / "base", None)
        self.base_tuning_score = SCORER(tuning, self.tuning.prompts).mean().item()
        self._recipe, self._seed = recipe, plan.seed

    def _held_out(self, recipe: Recipe) -> CachedPairs:
        wanted = recipe.evaluate.model_copy(update={"implicit_pairs": 128})
        held = inputs.held_out_pairs(
            recipe.model_copy(update={"evaluate": wanted}), self.family, parts.cache_dir(recipe), NoProgress()
        )
        assert held is not None
        return held

    def moved(self, adapter: Path) -> dict[str, float]:
        chosen = self._recipe.adapter
        adapters = Adapters.attach(
            self.family.denoiser,
            rank=chosen.rank,
            alpha=chosen.rank,
            targets=chosen.targets,
            dropout=0.0,
            seed=0,
        )
        try:
            adapters.load_state_dict(updates.to_state(updates.of_unet(*updates.load(adapter))))
            stream = PairStream(self.pairs, self.family, seed=self._seed, batch_pairs=64)
            return shift(self.family, adapters, stream, draws=2)
        finally:
            adapters.detach()


COLUMNS = (
    "objective", "chosen", "score", "strict", "look", "win rate", "shift", "‖ΔW‖/‖W‖", "winners' error", "losers' error"
)  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in sorted(found, key=lambda one: -one["score"]["difference"]):
        cells = [row["name"], short(row["chosen"])]
        cells += [_interval(row[key]["difference"], row[key]["ci95"], "+") for key in ("score", "strict", "aesthetic")]
        rate, *interval = row["win_rate"]
        cells += [_interval(rate, interval, ""), f"{row['prediction_shift'] / row['ref_error']:.2%}"]
        cells += [f"{row['norm']:.2%}"]
        cells += [f"{row[key] / row['ref_error']:+.2%}" for key in ("winner_rise", "loser_rise")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(value: float, ci95: Sequence[float], sign: str) -> str:
    return f"{value:{sign}.3f} [{ci95[0]:{sign}.3f}, {ci95[1]:{sign}.3f}]"


def put_into(document: Path, text: str) -> None:
    """Between the marks `<!-- measured -->` and `<!-- /measured -->`."""
    before = document.read_text("utf-8")
    marked = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.S)
    if not marked.search(before):
        raise SystemExit(f"{document} has no marks to put the table between")
    atomic.replace(document, marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="runs and pictures; reused")
    parser.add_argument("--out", type=Path, help="the JSON, also as a file")
    parser.add_argument("--docs", type=Path, help="a document to put the table into")
    parser.add_argument("--only", nargs="+", help="names of objectives")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-pairs", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of the table")
    parser.add_argument("--tuning-prompts", type=int, default=96)
    parser.add_argument("--sampler-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of training")
    chosen = parser.parse_args()
    plan = Plan(
        chosen.work,
        chosen.steps,
        chosen.batch_pairs,
        chosen.prompts,
        chosen.tuning_prompts,
        chosen.sampler_steps,
        chosen.seed,
    )
    names = [name.removeprefix(FOLDER) for name in shipped_names() if name.startswith(FOLDER)]
    if unknown := set(chosen.only or ()) - set(names):
        parser.error(f"no such objective: {', '.join(sorted(unknown))} (there are {', '.join(names)})")
    diffusers.utils.logging.set_verbosity_error()  # it expects adapters to have a part for the text encoders
    began = time.monotonic()
    shared = Shared(plan)
    found = []
    for name in chosen.only or names:
        found.append(measure(plan, name, shared))
        print(f"{name}: {found[-1]['score']['difference']:+.3f}; {time.monotonic() - began:.0f} s so far", flush=True)
    text = table(found)
    print(text)
    result = {
        "objectives": found,
        "common": {key: value for key, value in asdict(plan).items() if key != "work"},
        "base_tuning_score": shared.base_tuning_score,
        "base_score": shared.base_scores.mean().item(),
        "seconds": round(time.monotonic() - began, 1),
        "device": "cpu",
        "versions": {"lora-dpo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if chosen.docs is not None:
        put_into(chosen.docs, text)
    if chosen.out is not None:
        atomic.replace(chosen.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
