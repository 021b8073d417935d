"""What a run will hold in memory, phase by phase: its own code, traced on a fake device without weights or data."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_dpo import denoising, parts
from lora_dpo.adapters import Adapters
from lora_dpo.buckets import Size
from lora_dpo.cache import CachedPair, CachedPairs, default_images_per_batch
from lora_dpo.cache_fill import PROMPTS_PER_BATCH
from lora_dpo.ema import Ema
from lora_dpo.fake_device import FakeDevice, Kind
from lora_dpo.families import Conditioning, Family, Moments, uncropped
from lora_dpo.ledger import ADAPTER, ELSEWHERE, GRADIENTS, OPTIMIZER, REFERENCE, WEIGHTS, Ledger, Peak
from lora_dpo.recipe import Recipe
from lora_dpo.recompute import blocks
from lora_dpo.step import accumulate

GIB = 2**30
# Six int64: beside the moments of every picture.
GEOMETRY_BYTES = 48
FORWARD, BACKWARD, OPTIMIZER_STEP = "forward", "backward", "optimizer step"
ENCODE_IMAGES, ENCODE_PROMPTS = "encode images", "encode prompts"
HELD_OUT, SAMPLING, DECODING = "held-out pairs", "sampling", "decoding"
# What can be traced apart, and its phases, in the order in which a run comes to them.
ENCODING = (ENCODE_IMAGES, ENCODE_PROMPTS)
TRAINING = (REFERENCE, FORWARD, BACKWARD, OPTIMIZER_STEP)
EVALUATION = (HELD_OUT, SAMPLING, DECODING)
PHASES = (*ENCODING, *TRAINING, *EVALUATION)
# A GPU's memory that no tensor of ours has: CUDA's context and kernels, and of the traced peak what the allocator loses
# to fragments and the libraries take for their workspaces. Not traced, and not measured here.
CONTEXT_BYTES, FRAGMENTS = GIB // 2, 0.05
# bitsandbytes pages the state of weights of so many elements.
PAGED_ELEMENTS = 100_000


@dataclass(frozen=True)
class Estimate:
    """Peaks in bytes, of everything that is alive at that moment.

    Attributes:
        device: whose rules were followed, "cuda" or "cpu".
        phases: the peak of each, in the order in which a run comes to them.
        prompt_bytes: what one takes in the cache.
        notes: what was taken for granted.
        latent_channels, latent_scale: of the family.
        blocks: of the denoiser that can be computed again; 0 where only the encoding was traced.
    """

    device: Kind
    phases: dict[str, Peak]
    prompt_bytes: int
    notes: list[str]
    latent_channels: int
    latent_scale: int
    blocks: int = 0

    def picture_bytes(self, size: Size) -> int:
        """What a picture takes in the cache: mean and deviation in float32, and its geometry."""
        cells = (size[0] // self.latent_scale) * (size[1] // self.latent_scale)
        return 8 * self.latent_channels * cells + GEOMETRY_BYTES

    def highest(self, among: Sequence[str] = PHASES) -> str:
        """The phase with the highest peak."""
        return max((name for name in among if name in self.phases), key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> Peak:
        return self.phases[self.highest()]

    def allowance(self, peak: Peak) -> int:
        """For what is not traced; 0 on a CPU, where the process has memory of its own."""
        return int(CONTEXT_BYTES + FRAGMENTS * peak.total) if self.device == "cuda" else 0

    def needed(self, among: Sequence[str] = PHASES) -> int:
        """By the highest of these phases, with the allowance."""
        peak = self.phases[self.highest(among)]
        return peak.total + self.allowance(peak)


def estimate(recipe: Recipe, device: Kind = "cuda", among: Collection[str] = PHASES) -> Estimate:
    """Traces the phases of a run; SDXL's take seconds.

    Args:
        device: whose rules to follow; neither has to be here.
        among: one phase at least; all of `TRAINING` are traced if one is wanted.

    Raises:
        UserError: a base whose files are here and can't be used, or adapter targets that it doesn't have.
    """
    fake = FakeDevice(device)
    family, notes = parts.hollow_family(recipe, fake)
    side, batch = recipe.data.resolution, default_images_per_batch(recipe.data.resolution)
    with fake.running():
        if ENCODE_IMAGES in among:
            with fake.ledger.during(ENCODE_IMAGES):
                family.encode_images(torch.empty(batch, 3, side, side))
            family.release_encoders()
        with fake.ledger.during(ENCODE_PROMPTS):
            conditioning = family.encode_prompts([str(n) for n in range(PROMPTS_PER_BATCH)])
        conditioning = {name: tensor[:1].clone() for name, tensor in conditioning.items()}
        fake.ledger.count(ELSEWHERE, conditioning.values())  # on the disk
    family.release_encoders()
    count = 0
    if not {*TRAINING, *EVALUATION}.isdisjoint(among):
        adapters = _attached(recipe, family, fake)
        count = len(blocks(family.denoiser))
        with fake.running():
            if not {*TRAINING}.isdisjoint(among):
                pairs = BlankPairs(recipe.train.batch_pairs, family, side, conditioning)
                optimizer_step(recipe, family, adapters, pairs, fake.ledger, device)
            else:
                _with_gradients(adapters, fake.ledger)
            _evaluate(recipe, family, conditioning, fake.ledger, among)
    peaks = fake.ledger.peaks
    return Estimate(
        device,
        {name: peaks[name] for name in PHASES if name in peaks and name in among},
        prompt_bytes=sum(tensor.nbytes for tensor in conditioning.values()),
        notes=notes,
        latent_channels=family.latent_channels,
        latent_scale=family.latent_scale,
        blocks=count,
    )


def _attached(recipe: Recipe, family: Family, fake: FakeDevice) -> Adapters:
    family.device = torch.device("meta")
    with fake.building():
        adapters = parts.fresh_adapters(recipe, family)
        if parts.reference(recipe) == "adapter":
            adapters.keep_as_reference()
    family.device = fake.device
    fake.hold(family.denoiser)
    return adapters


def optimizer_step(
    recipe: Recipe, family: Family, adapters: Adapters, pairs: CachedPairs, ledger: Ledger, kind: Kind
) -> None:
    """One optimizer step as it is from the second on, when the optimizer has its state and gradients add up.

    It is `train`'s, with one of its passes: the others are alike. The ledger has to be on; real tensors will do too.
    """
    chosen, parameters = recipe.train, adapters.parameters()
    ledger.count_module(WEIGHTS, family.denoiser)
    ledger.count(ADAPTER, parameters.values())
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: ledger.count(GRADIENTS, [p.grad])) for p in parameters.values()
    ]
    method = parts.method(_without_stored_references(recipe), pairs, family, adapters)
    with ledger.during(OPTIMIZER_STEP, ADAPTER):
        ema = Ema(parameters, chosen.ema_decay) if chosen.ema_decay is not None else None
    optimizer = _optimizer(recipe, adapters, ledger, kind)
    size = chosen.micro_batch_pairs or chosen.batch_pairs
    if size == chosen.batch_pairs:
        optimizer.zero_grad(set_to_none=True)  # else the passes before this one have left theirs

    def phase() -> str:
        if adapters.in_reference:
            return REFERENCE
        return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD

    batch = next(method.batches(0)).only(slice(0, size))
    adapters.train()
    with ledger.during(phase):
        accumulate(method, batch, size, family.device, chosen.precision, Path())
    adapters.train(False)
    with ledger.during(OPTIMIZER_STEP, OPTIMIZER):
        torch.nn.utils.clip_grad_norm_(parameters.values(), chosen.max_grad_norm or math.inf)
        optimizer.step()
        if ema is not None:
            ema.update(1)
    for hook in hooks:
        hook.remove()


def _without_stored_references(recipe: Recipe) -> Recipe:
    """What is stored is read from a disk in later epochs; in the first it is computed, for fewer pairs at a time."""
    if not getattr(recipe.method, "reference_cache", False):
        return recipe
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"reference_cache": False})})


def _optimizer(recipe: Recipe, adapters: Adapters, ledger: Ledger, kind: Kind) -> torch.optim.Optimizer:
    """With its state, and every weight with a gradient."""
    paged = recipe.train.optimizer == "paged_adamw8bit"
    if paged:  # which a CPU refuses; its state is the same, in memory that both share
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"optimizer": "adamw8bit"})})
    optimizer = parts.optimizer(recipe, adapters)
    for group in optimizer.param_groups:
        if kind == "cuda" and "foreach" in group and not group.get("fused"):
            group["foreach"] = True  # torch's choice on a GPU
    _with_gradients(adapters, ledger)
    with ledger.during(OPTIMIZER_STEP, OPTIMIZER):
        optimizer.step()
    if paged:
        for parameter, state in optimizer.state.items():
            if parameter.numel() >= PAGED_ELEMENTS:
                ledger.count(ELSEWHERE, [state.get(name) for name in ("state1", "state2")])
    return optimizer


def _with_gradients(adapters: Adapters, ledger: Ledger) -> None:
    ledger.count(ADAPTER, adapters.parameters().values())
    for parameter in adapters.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
        ledger.count(GRADIENTS, [parameter.grad])


def _evaluate(
    recipe: Recipe, family: Family, conditioning: Conditioning, ledger: Ledger, among: Collection[str]
) -> None:
    """After training: the gradients are still there, the optimizer is gone."""
    side = recipe.data.resolution

    def images(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Conditioning]:
        shape = (count, family.latent_channels, side // family.latent_scale, side // family.latent_scale)
        repeated = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in conditioning.items()}
        t = torch.zeros(count, dtype=torch.int64)
        return torch.empty(shape, dtype=dtype), t, family.with_geometry(repeated, uncropped(side, side, count))

    chosen = recipe.evaluate
    if chosen.implicit_pairs and HELD_OUT in among:
        with torch.no_grad(), ledger.during(HELD_OUT):
            x_0, t, prompts = images(recipe.train.micro_batch_pairs or recipe.train.batch_pairs, torch.float32)
            denoising.errors(family, x_0, torch.empty_like(x_0), t, prompts)
            del x_0, t, prompts
    if not chosen.prompts or {SAMPLING, DECODING}.isdisjoint(among):
        return
    components = family.pipeline().components  # the encoders are loaded again
    with torch.no_grad(), ledger.during(SAMPLING):
        family.encode_prompts([str(n) for n in range(chosen.batch)])
        for name in ("text_encoder", "text_encoder_2"):  # `sampling` puts them aside
            if components.get(name) is not None:
                ledger.count_module(ELSEWHERE, components[name])
        family.predict(*images(chosen.batch * (2 if chosen.guidance > 1 else 1), family.dtype))
    with torch.no_grad(), ledger.during(DECODING):
        family.decode(images(chosen.batch, family.dtype)[0])


class BlankPairs(CachedPairs):
    """Pairs of one size, without content."""

    def __init__(self, count: int, family: Family, resolution: int, conditioning: Conditioning) -> None:
        self.keys = self.prompts = self.origins = [str(n) for n in range(count)]
        self._side, self._conditioning = resolution, conditioning
        cells = resolution // family.latent_scale
        self._shape = (1, family.latent_channels, cells, cells)

    def size(self, index: int) -> Size:
        return self._side, self._side

    def pair(self, index: int) -> CachedPair:
        winner, loser = (Moments(torch.zeros(self._shape), torch.zeros(self._shape)) for _ in range(2))
        size = uncropped(self._side, self._side)
        return CachedPair(winner, loser, size, size, index)

    def prompt_index(self, index: int) -> int:
        return index

    def conditioning(self, prompt_indices: list[int]) -> Conditioning:
        return {name: torch.cat([tensor[:1]] * len(prompt_indices)) for name, tensor in self._conditioning.items()}
