"""Which pairs come when, and their draws: everything here is a pure function of (seed, step).

Epochs are permutations keyed by their number, so the pairs of step s follow from s alone. A pair's n-th visit has its
own timestep, noise, VAE posterior sample and prompt dropout, keyed by the pair's content: they don't depend on the
batch, on the other pairs, or on the method, so that runs are compared on common random numbers. Nor does a pair's
bucket decide when it comes: only within its step do the pairs lie side by side by size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPairs
from lora_dpo.errors import UserError
from lora_dpo.families import Conditioning, Family, Moments
from lora_dpo.randomness import numpy_generator, seed_of, torch_generator

PAIR_ORDER = "pair order"
TIMESTEP, TIMESTEP_LOSER = "timestep", "timestep of the loser"
NOISE, NOISE_LOSER = "noise", "noise of the loser"
POSTERIOR_WINNER = "VAE posterior of the winner"
POSTERIOR_LOSER = "VAE posterior of the loser"
CAPTION_DROPOUT = "caption dropout"
ADAPTER_DROPOUT = "adapter dropout"
STRATA_LOSER = "strata of the losers"
EMPTY_PROMPT = -1
TimestepSampling = Literal["uniform", "stratified"]


Side = Literal["winner", "loser"]


class Images(NamedTuple):
    """Images at their draws, as `denoising` takes them."""

    x_0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    t: Int[Tensor, " b"]
    conditioning: Conditioning


@dataclass(frozen=True)
class Part:
    """Some pairs of one optimizer step, drawn and on the family's device: all that a loss needs.

    Attributes:
        keys, indices, visits: the pairs' content keys, places in the cache, and which of a pair's draws.
        batch_pairs: pairs in the whole optimizer step.
        noise, t: ε and timestep of the winner, and of the loser too unless images are independent.
        noise_loser, t_loser: of the loser.
        label: the probability that the winner is the better one; ½ is a tie.
        seed: the stream's, of the adapters' dropout, which is the one draw made inside a pass.
    """

    keys: list[str]
    indices: list[int]
    visits: list[int]
    batch_pairs: int
    x_0_winner: Float[Tensor, "pair c h w"]
    x_0_loser: Float[Tensor, "pair c h w"]
    noise: Float[Tensor, "pair c h w"]
    t: Int[Tensor, " pair"]
    noise_loser: Float[Tensor, "pair c h w"]
    t_loser: Int[Tensor, " pair"]
    label: Float[Tensor, " pair"]
    conditioning_winner: Conditioning
    conditioning_loser: Conditioning
    seed: int

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, *sides: Side) -> Images:
        """All of the first side, then all of the second."""
        one = [
            Images(self.x_0_winner, self.noise, self.t, self.conditioning_winner)
            if side == "winner"
            else Images(self.x_0_loser, self.noise_loser, self.t_loser, self.conditioning_loser)
            for side in sides
        ]
        if len(one) == 1:
            return one[0]
        return Images(
            torch.cat([images.x_0 for images in one]),
            torch.cat([images.noise for images in one]),
            torch.cat([images.t for images in one]),
            {name: torch.cat([images.conditioning[name] for images in one]) for name in one[0].conditioning},
        )

    def pair(self, place: int) -> Part:
        """One of its pairs alone, still a share of the whole step; its dropout is not what it has in the whole part."""
        at = slice(place, place + 1)
        return replace(
            self,
            keys=self.keys[at],
            indices=self.indices[at],
            visits=self.visits[at],
            x_0_winner=self.x_0_winner[at],
            x_0_loser=self.x_0_loser[at],
            noise=self.noise[at],
            t=self.t[at],
            noise_loser=self.noise_loser[at],
            t_loser=self.t_loser[at],
            label=self.label[at],
            conditioning_winner={name: value[at] for name, value in self.conditioning_winner.items()},
            conditioning_loser={name: value[at] for name, value in self.conditioning_loser.items()},
        )

    def dropout(self, adapters: Adapters, *sides: Side) -> AbstractContextManager[None]:
        """Scope of a policy pass: adapter dropout follows from the pairs' draws, the global state is left as it was.

        Args:
            sides: of a pass of one side alone, which has draws of its own.
        """
        if not adapters.has_dropout:
            return nullcontext()
        places = zip(self.keys, self.visits, strict=True)
        indices = [*(index for place in places for index in place), *sides]
        return _seeded(seed_of(self.seed, ADAPTER_DROPOUT, *indices), self.noise.device)


@dataclass(frozen=True)
class StepBatch:
    """The pairs of one optimizer step; tensors are made part by part.

    Attributes:
        step: 0-based.
        indices, visits: which pairs, and which of a pair's draws; pairs of one size are neighbours.
    """

    stream: PairStream
    step: int
    indices: list[int]
    visits: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def keys(self) -> list[str]:
        return [self.stream.pairs.keys[index] for index in self.indices]

    def describe(self) -> list[dict[str, str | int]]:
        """Per pair, all that its draws follow from, for a person to look at."""
        stream, pairs = self.stream, self.stream.pairs
        sides = {"timestep": False} | ({"timestep_loser": True} if stream.independent_images else {})
        return [
            {
                "key": pairs.keys[index],
                "origin": pairs.origins[index],
                "prompt": pairs.prompts[pairs.prompt_index(index)],
                "seed": stream.seed,
                "visit": visit,
                **{name: stream.timestep(index, visit, loser=loser) for name, loser in sides.items()},
            }
            for index, visit in zip(self.indices, self.visits, strict=True)
        ]

    def parts(self, micro_batch_pairs: int | None = None) -> Iterator[Part]:
        """In order, pairs of one size, `micro_batch_pairs` at a time (None: all of them); some may be smaller."""
        for chosen in self.stream.pairs.runs(self.indices, micro_batch_pairs or len(self)):
            yield self.stream.part(self.indices[chosen], self.visits[chosen], batch_pairs=self.stream.batch_pairs)

    def only(self, chosen: slice) -> StepBatch:
        """Some of the step's pairs, of which the losses are still shares of the whole step's."""
        return replace(self, indices=self.indices[chosen], visits=self.visits[chosen])


class PairStream:
    """The shared stream of the methods that learn from pairs.

    Args:
        pairs: the cache; its keys key the draws.
        batch_pairs: pairs per optimizer step.
        visits_per_pair: bounds a pair's distinct draws: visit n uses draw n modulo it. 0: no bound.
        caption_dropout: share of visits trained with the empty prompt.
        timestep_range: timesteps are uniform in low … high − 1; None: all of the schedule's.
        independent_images: winner and loser have a timestep and noise each, as images that were never a pair have.
        timestep_sampling: "uniform": each pair's timestep on its own. "stratified": the pairs of a step are spread over
            as many equal parts of the range, one in each. Every pair's timestep is uniform still, and the mean over a
            step varies less.

    Attributes:
        draws: what a pair's draws follow from, beside its key and its visit.

    Raises:
        UserError: no pairs, or a range outside the schedule.
    """

    def __init__(
        self,
        pairs: CachedPairs,
        family: Family,
        *,
        seed: int,
        batch_pairs: int,
        visits_per_pair: int = 0,
        caption_dropout: float = 0.0,
        timestep_range: tuple[int, int] | None = None,
        independent_images: bool = False,
        timestep_sampling: TimestepSampling = "uniform",
    ) -> None:
        if len(pairs) == 0:
            raise UserError("there are no pairs to train on", where="data", hint="see which rows were dropped, and why")
        last = family.schedule.num_timesteps
        low, high = timestep_range or (0, last)
        if not 0 <= low < high <= last:
            raise UserError(
                f"[{low}, {high}) is not a part of the model's timesteps [0, {last})", where="method.timestep_range"
            )
        self.pairs, self.family, self.seed, self.batch_pairs = pairs, family, seed, batch_pairs
        self.visits_per_pair, self.caption_dropout, self.timestep_range = visits_per_pair, caption_dropout, (low, high)
        self.independent_images, self.timestep_sampling = independent_images, timestep_sampling
        self.draws: dict[str, Any] = {
            "seed": seed,
            "caption_dropout": caption_dropout,
            "timestep_range": (low, high),
            "independent_images": independent_images,
            "timestep_sampling": timestep_sampling,
        }
        if timestep_sampling == "stratified":
            self.draws |= {"batch_pairs": batch_pairs, "pairs": len(pairs)}
        # A step of an ordinary run touches one or two epochs; a step of more pairs than there are touches each once.
        self._order = lru_cache(maxsize=2)(self._permutation)
        self._places = lru_cache(maxsize=2)(lambda epoch: np.argsort(self._order(epoch)))

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        step = start_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> StepBatch:
        """The batch of optimizer step `step`, whatever came before."""
        drawn = []
        for position in range(step * self.batch_pairs, (step + 1) * self.batch_pairs):
            epoch, place = divmod(position, len(self.pairs))
            visit = epoch % self.visits_per_pair if self.visits_per_pair else epoch
            drawn.append((int(self._order(epoch)[place]), visit))
        drawn.sort(key=lambda place: self.pairs.size(place[0]))  # stable
        indices, visits = zip(*drawn, strict=True)
        return StepBatch(self, step, list(indices), list(visits))

    def part(self, indices: Sequence[int], visits: Sequence[int], *, batch_pairs: int) -> Part:
        """The draws of the given visits, all of one size, and the latents and conditioning they belong to."""
        keys = [self.pairs.keys[index] for index in indices]
        pairs = [self.pairs.pair(index) for index in indices]
        places = list(zip(keys, visits, strict=True))
        like = [pair.winner.mean for pair in pairs]
        device = self.family.device
        prompts = [
            EMPTY_PROMPT if self._uniform(CAPTION_DROPOUT, *place) < self.caption_dropout else pair.prompt
            for place, pair in zip(places, pairs, strict=True)
        ]
        conditioning = {name: value.to(device) for name, value in self.pairs.conditioning(prompts).items()}
        noise = self._normal(NOISE, places, like)
        drawn = list(zip(indices, visits, strict=True))
        t = torch.tensor([self.timestep(*one) for one in drawn], device=device)
        noise_loser, t_loser = noise, t
        if self.independent_images:
            noise_loser = self._normal(NOISE_LOSER, places, like)
            t_loser = torch.tensor([self.timestep(*one, loser=True) for one in drawn], device=device)
        return Part(
            keys=keys,
            indices=list(indices),
            visits=list(visits),
            batch_pairs=batch_pairs,
            x_0_winner=self._latents([pair.winner for pair in pairs], self._normal(POSTERIOR_WINNER, places, like)),
            x_0_loser=self._latents([pair.loser for pair in pairs], self._normal(POSTERIOR_LOSER, places, like)),
            noise=noise,
            t=t,
            noise_loser=noise_loser,
            t_loser=t_loser,
            label=torch.tensor([pair.label for pair in pairs], device=device),
            conditioning_winner=self.family.with_geometry(
                conditioning, torch.cat([pair.winner_geometry for pair in pairs]).to(device)
            ),
            conditioning_loser=self.family.with_geometry(
                conditioning, torch.cat([pair.loser_geometry for pair in pairs]).to(device)
            ),
            seed=self.seed,
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, PAIR_ORDER, epoch).permutation(len(self.pairs))

    def _uniform(self, purpose: str, key: str, visit: int) -> float:
        generator = torch_generator(self.seed, purpose, key, visit)
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    def timestep(self, index: int, visit: int, *, loser: bool = False) -> int:
        """t of a pair's visit."""
        low, high = self.timestep_range
        independent = loser and self.independent_images
        purpose, key = TIMESTEP_LOSER if independent else TIMESTEP, self.pairs.keys[index]
        if self.timestep_sampling == "uniform":
            return int(torch.randint(low, high, (), generator=torch_generator(self.seed, purpose, key, visit)))
        stratum = self._stratum(index, visit, independent=independent)
        share = (stratum + self._uniform(purpose, key, visit)) / self.batch_pairs
        return min(high - 1, low + int(share * (high - low)))

    def _stratum(self, index: int, visit: int, *, independent: bool) -> int:
        """The pair's place in the step in which it is visited the n-th time, and that is in epoch n.

        With `visits_per_pair` later epochs repeat these draws, in other company: their steps aren't stratified.
        """
        step, place = divmod(visit * len(self.pairs) + int(self._places(visit)[index]), self.batch_pairs)
        if independent:
            return int(numpy_generator(self.seed, STRATA_LOSER, step).permutation(self.batch_pairs)[place])
        return place

    def _normal(self, purpose: str, places: Sequence[tuple[str, int]], like: Sequence[Tensor]) -> Tensor:
        draws = [
            torch.randn(latent.shape, generator=torch_generator(self.seed, purpose, *place))
            for place, latent in zip(places, like, strict=True)
        ]
        return torch.cat(draws).to(self.family.device)

    def _latents(self, moments: Sequence[Moments], noise: Tensor) -> Tensor:
        device = self.family.device
        mean = torch.cat([m.mean for m in moments]).to(device)
        std = torch.cat([m.std for m in moments]).to(device)
        return self.family.latents(Moments(mean, std), noise)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
