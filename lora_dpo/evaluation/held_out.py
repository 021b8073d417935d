"""Does the adapted model, read as a classifier, prefer the winners of pairs it was not trained on?

Implicit accuracy says whether the objective generalises. It is no measure of image quality: the strongest, most
damaging settings often have the highest one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo import denoising
from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPairs
from lora_dpo.denoising import ErrorSpace
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.evaluation.statistics import Interval, paired_bootstrap, win_rate_interval
from lora_dpo.families import Family, Moments
from lora_dpo.methods.losses import dpo, margin
from lora_dpo.progress import Progress
from lora_dpo.randomness import torch_generator


@dataclass(frozen=True)
class HeldOut:
    """Means over pairs, each pair averaged over its draws first.

    Attributes:
        accuracy: share of pairs whose margin is positive, zeros half, with its 95 % interval over prompts.
        margin: r_winner − r_loser, the implicit reward's difference, with its 95 % interval over prompts.
        loss: the DPO loss of single draws, ln 2 without an adapter.
        error_winner, error_loser, ref_error_winner, ref_error_loser: of the policy and the reference; means over
            c, h, w.
    """

    pairs: int
    prompts: int
    draws: int
    accuracy: float
    accuracy_ci95: Interval
    margin: float
    margin_ci95: Interval
    loss: float
    error_winner: float
    error_loser: float
    ref_error_winner: float
    ref_error_loser: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; unknown bounds become None."""
        values = asdict(self)
        for name in ("accuracy_ci95", "margin_ci95"):
            values[name] = [None if math.isnan(bound) else bound for bound in values[name]]
        return values


def held_out(
    family: Family,
    adapters: Adapters,
    pairs: CachedPairs,
    *,
    beta: int | float,
    draws: int = 4,
    batch: int = 16,
    seed: int = 0,
    limit: int | None = None,
    timestep_range: tuple[int, int] | None = None,
    error_space: ErrorSpace = "epsilon",
    progress: Progress | None = None,
) -> HeldOut:
    """Implicit preference on fixed draws: the same (t, ε, posterior sample) whatever the adapter, batch or order.

    r_winner − r_loser = −(β/2)·[(e_w − ref_w) − (e_l − ref_l)] (eq. 46 of the paper's supplement), averaged over
    `draws`. Winner and loser share t and ε. A pair's timesteps are stratified: draw d of D lies in the d-th of D equal
    parts of the range, which leaves the mean as it is and makes it vary less.

    Args:
        draws: per pair; each costs four passes of the denoiser.
        batch: pairs per pass, all of one size.
        limit: use at most so many pairs, the first by content key (a fixed, arbitrary subset).
        timestep_range: as in training, [low, high); None: all of the schedule's.
        progress: a job of pairs × draws units.

    Raises:
        UserError: no pairs, or a range outside the schedule.
        LoraDpoError: an error that is not finite, naming the pairs.
    """
    low, high = timestep_range or (0, family.schedule.num_timesteps)
    if len(pairs) == 0:
        raise UserError("there are no held-out pairs to evaluate on", where="data")
    if not 0 <= low < high <= family.schedule.num_timesteps:
        raise UserError(f"[{low}, {high}) is not a part of the model's timesteps [0, {family.schedule.num_timesteps})")
    if draws < 1 or batch < 1 or (limit is not None and limit < 1):
        raise UserError(f"draws, batch and limit have to be at least 1, got {draws}, {batch} and {limit}")
    chosen = sorted(range(len(pairs)), key=lambda index: pairs.keys[index])[:limit]
    chosen.sort(key=pairs.size)
    if progress is not None:
        progress.start(len(chosen) * draws, "held-out pairs")
    # rows: error_winner, error_loser, ref_error_winner, ref_error_loser
    errors = torch.zeros(4, draws, len(chosen), dtype=torch.float32)
    try:
        for places in pairs.runs(chosen, batch):
            part = chosen[places]
            for draw in range(draws):
                errors[:, draw, places] = _errors(
                    family, adapters, pairs, part, draw, draws, (low, high), seed, error_space
                )
                if progress is not None:
                    progress.advance(len(part))
    finally:
        if progress is not None:
            progress.stop()
    finite = errors.isfinite().all(dim=0).all(dim=0).tolist()
    if not all(finite):
        bad = [pairs.keys[index] for index, fine in zip(chosen, finite, strict=True) if not fine]
        raise LoraDpoError(f"the held-out error isn't finite (pairs {', '.join(bad[:8])})")

    winner, loser, ref_winner, ref_loser = errors.flatten(1).unbind()
    flat = (winner, loser, ref_winner, ref_loser)
    margins = margin(*flat, beta=float(beta)).reshape(draws, -1).double().mean(dim=0).numpy()
    groups = [pairs.prompt_index(index) for index in chosen]
    outcomes = (np.sign(margins) + 1) / 2
    means = errors.double().mean(dim=(1, 2)).tolist()
    return HeldOut(
        pairs=len(chosen),
        prompts=len(set(groups)),
        draws=draws,
        accuracy=float(outcomes.mean()),
        accuracy_ci95=win_rate_interval(outcomes, groups, seed=seed),
        margin=float(margins.mean()),
        margin_ci95=paired_bootstrap(margins, groups, seed=seed),
        loss=dpo(*flat, beta=float(beta)).double().mean().item(),
        error_winner=means[0],
        error_loser=means[1],
        ref_error_winner=means[2],
        ref_error_loser=means[3],
    )


@torch.no_grad()
def _errors(
    family: Family,
    adapters: Adapters,
    pairs: CachedPairs,
    indices: list[int],
    draw: int,
    draws: int,
    timesteps: tuple[int, int],
    seed: int,
    error_space: ErrorSpace,
) -> Float[Tensor, "4 pair"]:
    """Errors of the policy for winners and losers, then the reference's, at one draw per pair; on the CPU."""
    keys, held = [pairs.keys[index] for index in indices], [pairs.pair(index) for index in indices]
    device, (low, high) = family.device, timesteps

    def normal(purpose: str) -> Tensor:
        shape = held[0].winner.mean.shape
        return torch.cat([torch.randn(shape, generator=torch_generator(seed, purpose, key, draw)) for key in keys]).to(
            device
        )

    def latents(moments: list[Moments], purpose: str) -> Tensor:
        mean, std = (torch.cat([m[i] for m in moments]).to(device) for i in range(2))
        return family.latents(Moments(mean, std), normal(purpose))

    where = [torch.rand((), generator=torch_generator(seed, "held-out timestep", key, draw)).item() for key in keys]
    t = torch.tensor([min(high - 1, low + int((draw + u) / draws * (high - low))) for u in where], device=device)
    noise = normal("held-out noise")
    prompts = {n: v.to(device) for n, v in pairs.conditioning([pair.prompt for pair in held]).items()}
    sides = [
        (
            latents([getattr(pair, side) for pair in held], f"held-out posterior of the {side}"),
            family.with_geometry(prompts, torch.cat([getattr(pair, f"{side}_geometry") for pair in held]).to(device)),
        )
        for side in ("winner", "loser")
    ]
    with adapters.reference():
        reference = [denoising.errors(family, x_0, noise, t, conditioning, error_space) for x_0, conditioning in sides]
    policy = [denoising.errors(family, x_0, noise, t, conditioning, error_space) for x_0, conditioning in sides]
    return torch.stack([*policy, *reference]).float().cpu()
