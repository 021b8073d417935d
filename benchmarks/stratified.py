"""What spreading a step's timesteps evenly buys: the variance of a step's gradient and loss against uniform timesteps.

    python benchmarks/stratified.py --repeats 32 --train-steps 60

On the tiny world, for DPO and SFT, at a fresh adapter and after some steps of DPO. The pairs of the step are fixed;
noise and timesteps are drawn anew in every repeat, the noise alike for both ways. A ratio is stratified over uniform;
its interval is a bootstrap over repeats. Prints a table, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_dpo import build, inputs, parts, updates
from lora_dpo import recipe as recipes
from lora_dpo.adapters import Adapters
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.methods.stream import PairStream
from lora_dpo.progress import NoProgress

KINDS = ("dpo", "sft")
WAYS = ("uniform", "stratified")


def timesteps(way: str, batch: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    if way == "uniform":
        return torch.from_numpy(rng.integers(0, count, batch))
    return torch.from_numpy(((rng.permutation(batch) + rng.random(batch)) / batch * count).astype(np.int64))


def gradients(method: PairMethod, stream: PairStream, adapters: Adapters, repeats: int) -> dict[str, Any]:
    """Per way: the gradients [repeat, weight] and losses [repeat] of one step's pairs."""
    batch = stream.batch(0)
    found: dict[str, Any] = {way: ([], []) for way in WAYS}
    for repeat in range(repeats):
        drawn = stream.part(batch.indices, [repeat] * len(batch), batch_pairs=len(batch))
        for way in WAYS:
            rng = np.random.default_rng([repeat, WAYS.index(way)])
            t = timesteps(way, len(batch), stream.family.schedule.num_timesteps, rng)
            for parameter in adapters.parameters().values():
                parameter.grad = None
            loss = method.backward(replace(drawn, t=t, t_loser=t)).loss.item()
            grads = [p.grad.flatten() for p in adapters.parameters().values() if p.grad is not None]
            found[way][0].append(torch.cat(grads).double().numpy())
            found[way][1].append(loss)
    return {way: (np.stack(g), np.array(losses)) for way, (g, losses) in found.items()}


def ratio(found: dict[str, Any], which: int) -> tuple[float, float, float]:
    """Variance (of vectors: the covariance's trace) of stratified over uniform, with a 95 % interval."""

    def variance(values: np.ndarray) -> float:
        return float(values.reshape(len(values), -1).var(axis=0, ddof=1).sum())

    def distances(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(len(values), -1)
        return flat @ flat.T

    grams = {way: distances(found[way][which] - found[way][which].mean(axis=0)) for way in WAYS}
    rng, draws = np.random.default_rng(0), []
    for _ in range(2000):
        traces = []
        for way in WAYS:
            chosen = rng.integers(0, len(grams[way]), len(grams[way]))
            gram = grams[way][np.ix_(chosen, chosen)]
            traces.append((np.trace(gram) - gram.mean() * len(gram)) / (len(gram) - 1))
        draws.append(traces[1] / traces[0])
    low, high = np.quantile(draws, [0.025, 0.975])
    return variance(found["stratified"][which]) / variance(found["uniform"][which]), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--batch-pairs", type=int, default=16)
    parser.add_argument("--train-steps", type=int, default=60)
    chosen = parser.parse_args()
    arguments = [f"train.batch_pairs={chosen.batch_pairs}", "evaluate.prompts=0", "evaluate.implicit_pairs=0"]
    recipe = recipes.load("quickstart", [*arguments, f"train.steps={chosen.train_steps}"])
    family = parts.family(recipe, torch.device("cpu"))
    pairs = inputs.pairs(recipe, family, parts.cache_dir(recipe), NoProgress())
    with tempfile.TemporaryDirectory() as directory:
        trained = build.run(recipe, Path(directory) / "run", quiet=True)
        state = updates.to_state(updates.of_unet(*updates.load(Path(directory) / "run" / trained.result["adapter"])))
    rows = []
    for after in (0, chosen.train_steps):
        adapters = Adapters.attach(family.denoiser, rank=recipe.adapter.rank, alpha=recipe.adapter.rank, seed=0)
        if after:
            adapters.load_state_dict(state)
        for kind in KINDS:
            made = parts.objective(recipes.load("quickstart", [f"method.kind={kind}"]).method)
            stream = PairStream(pairs, family, seed=0, batch_pairs=chosen.batch_pairs)
            found = gradients(PairMethod(stream, family, adapters, made), stream, adapters, chosen.repeats)
            rows.append({"kind": kind, "after_steps": after, "gradient": ratio(found, 0)})
            if kind == "sft" or after:  # DPO's loss of a fresh adapter is ln 2 at every draw
                rows[-1]["loss"] = ratio(found, 1)
        adapters.detach()
    print(f"{'objective':<11}{'after':>6}  {'variance of the gradient':<26}variance of the loss")
    for row in rows:
        shown = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) if name in row else "-" for name in ("gradient", "loss")]
        print(f"{row['kind']:<11}{row['after_steps']:>6}  {shown[0]:<26}{shown[1]}")
    result = {
        "rows": rows,
        "repeats": chosen.repeats,
        "batch_pairs": chosen.batch_pairs,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
