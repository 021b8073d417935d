"""What `step.py` times: one optimizer step of ours in its modes, and with settings of torch that may make it faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from true_size import save_base, save_pairs

from lora_dpo import denoising, inputs, parts
from lora_dpo import recipe as recipes
from lora_dpo.adapters import Adapters
from lora_dpo.families import Family
from lora_dpo.methods.pairs import PairMethod
from lora_dpo.progress import NoProgress
from lora_dpo.recipe import Recipe
from lora_dpo.recompute import recompute
from lora_dpo.step import Step, autocast

CASES = {
    # the shipped recipe, pixels, precision
    "tinyworld": ("quickstart", 64, "float32"),
    "sd15": ("sd15_lora", 256, "bfloat16"),
    "sdxl": ("sdxl_lora", 256, "bfloat16"),
}
REFERENCE, POLICY, BACKWARD = "reference", "policy forward", "backward"


def nothing() -> None: ...


@dataclass
class Mode:
    """One way to make a step.

    Attributes:
        make: the step.
        enter, leave: before and after it, not timed.
        cold: seconds of the first call, which compiles or loads what later ones have.
        cpu_seconds: of this process's threads; what others do at the same time counts for less there.
        images: how many go through the UNet, forward, in one step.
    """

    make: Callable[[], Any]
    enter: Callable[[], Any] = nothing
    leave: Callable[[], Any] = nothing
    cold: float | None = None
    images: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def load_recipe(name: str, work: Path, pairs: int, resolution: int | None) -> Recipe:
    """The case's shipped recipe with one pair a step, and AdamW, as the published scripts have it.

    The base of true size and its pairs are made in `work`, where they aren't there.
    """
    shipped, usual, precision = CASES[name]
    resolution = resolution or usual
    overrides = [f"data.limit={pairs}", f"output.cache_dir={work / 'cache'}"]
    if name != "tinyworld":
        file = work / f"pairs-{pairs}-{resolution}.parquet"
        save_base(name, work / "base")
        if not file.exists():
            save_pairs(file, pairs, resolution)
        overrides += [f"data.path={file}", f"base.model={work / 'base'}", "data.heldout_fraction=0"]
        overrides += [f"base.vae={work / 'base' / 'vae'}"] if name == "sdxl" else []
    return recipes.load(
        shipped,
        [
            *overrides, f"data.resolution={resolution}", "data.aspect=square", "data.caption_dropout=0",
            f"base.dtype={precision}", f"train.precision={precision}", "train.batch_pairs=1",
            "train.micro_batch_pairs=1", "train.optimizer=adamw", "train.gradient_checkpointing=none",
        ],
    )  # fmt: skip


@dataclass
class Ours:
    """The engine of `lora-dpo train`, made from a recipe by the same functions.

    Attributes:
        pairs: encoded.
        filled: the reference's errors of all pairs are stored.
    """

    recipe: Recipe
    family: Family
    pairs: Any
    work: Path
    filled: bool = False

    @cached_property
    def adapters(self) -> Adapters:
        return parts.adapters(self.recipe, self.family, None, print)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return parts.optimizer(self.recipe, self.adapters)

    def method(self, *, stored: bool) -> PairMethod:
        """With the reference's errors stored, of one draw for each pair; or without, and ever new draws."""
        more = {"reference_cache": True, "visits_per_pair": 1} if stored else {}
        chosen = self.recipe.method.model_copy(update=more)
        made = parts.method(self.recipe.model_copy(update={"method": chosen}), self.pairs, self.family, self.adapters)
        assert isinstance(made, PairMethod)
        return made

    def mode(self, *, stored: bool, checkpointing: Any = "none", **other: Any) -> Mode:
        """`other` are arguments of `Step`."""
        train = self.recipe.train
        options: dict[str, Any] = {"optimizer": self.optimizer, "precision": train.precision} | other
        method = self.method(stored=stored)
        step = Step(
            method=method,
            adapters=self.adapters,
            device=self.family.device,
            not_finite=self.work / "not_finite.json",
            micro_batch_pairs=1,
            max_grad_norm=train.max_grad_norm,
            **options,
        )
        batches = method.batches(0)

        def make() -> dict[str, float]:
            return step(next(batches), train.learning_rate)

        if stored and not self.filled:
            for _ in range(len(self.pairs)):
                make()
            if make()["reference_passes"]:
                raise AssertionError("the reference's errors were not found where they were stored")
            self.filled = True
        return Mode(make, partial(recompute, self.family.denoiser, checkpointing))

    def bare(self) -> Mode:
        """Forward and backward pass of the policy alone, on one pair that was drawn before."""
        batch = next(self.method(stored=False).batches(0))
        (part,) = batch.parts(1)
        images = part.images("winner", "loser")
        parameters = list(self.adapters.parameters().values())

        def make() -> None:
            with autocast(self.family.device, self.recipe.train.precision):
                residual = denoising.residuals(self.family, *images)
            residual.square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        return Mode(make, partial(recompute, self.family.denoiser, "none"))

    def encoding(self, pixels: torch.Tensor, prompt: str) -> Mode:
        """What the cache computes for one pair, once."""

        def make() -> None:
            self.family.encode_images(pixels)
            self.family.encode_prompts([prompt])

        return Mode(make)


def open_ours(name: str, work: Path, pairs: int, resolution: int | None, device: torch.device) -> Ours:
    recipe = load_recipe(name, work, pairs, resolution)
    family = parts.family(recipe, device)
    return Ours(recipe, family, inputs.pairs(recipe, family, work / "cache", NoProgress()), work)


def variants(ours: Ours, names: list[str]) -> dict[str, Mode]:
    """Settings of torch, each beside the step as it is, with stored references ("cached") and without ("first")."""
    train, denoiser = ours.recipe.train, cast(Any, ours.family.denoiser)
    options = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    parameters = list(ours.adapters.parameters().values())
    found = {"cached": ours.mode(stored=True)}
    if "fused AdamW" in names:
        found["fused AdamW"] = ours.mode(stored=True, optimizer=torch.optim.AdamW(parameters, fused=True, **options))
    if "foreach AdamW" in names:
        foreach = torch.optim.AdamW(parameters, foreach=True, **options)
        found["foreach AdamW"] = ours.mode(stored=True, optimizer=foreach)
    if "no autocast" in names:
        found["no autocast"] = ours.mode(stored=True, precision="float32")
    if "channels_last" in names:
        found["channels_last"] = mode = ours.mode(stored=True)
        mode.enter = lambda: denoiser.to(memory_format=torch.channels_last)
        mode.leave = lambda: denoiser.to(memory_format=torch.contiguous_format)
    if "TF32" in names:
        found["TF32"] = mode = ours.mode(stored=True)
        mode.enter = partial(torch.set_float32_matmul_precision, "high")
        mode.leave = partial(torch.set_float32_matmul_precision, "highest")
    if "compiled blocks" in names:
        blocks = [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]
        found["compiled blocks"] = _compiled(ours.mode(stored=True), blocks)
        found["first"] = ours.mode(stored=False)
        found["first, compiled blocks"] = _compiled(ours.mode(stored=False), blocks)
    if "compiled UNet" in names:
        found["compiled UNet"] = _compiled(ours.mode(stored=True), [denoiser])
    return found


VARIANTS = ("no autocast", "channels_last", "TF32", "fused AdamW", "foreach AdamW", "compiled blocks", "compiled UNet")


def _compiled(mode: Mode, modules: list[nn.Module]) -> Mode:
    """The mode with these modules compiled, and as they were for the modes between."""
    compiled: dict[nn.Module, Any] = {}

    def enter() -> None:
        for module in modules:
            if module not in compiled:
                module.compile()
                compiled[module] = module._compiled_call_impl
            module._compiled_call_impl = compiled[module]

    def leave() -> None:
        for module in modules:
            module._compiled_call_impl = None

    mode.enter, mode.leave = enter, leave
    return mode


class Profile:
    """Seconds of `now` by part; a part that is named twice is added up."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self.seconds = now, dict[str, float]()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - began

    def timed(self, part: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.clock(part if isinstance(part, str) else part()):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def of(self, ours: Ours) -> Iterator[None]:
        """Scope in which the parts of our step are timed where they are called."""
        backward, clip, draw = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_, parts.PairStream.part
        places: list[tuple[Any, str, Callable[..., Any]]] = [
            (parts.PairStream, "part", self.timed("data", draw)),
            (ours.family, "predict", self.timed(_whose_pass, ours.family.predict)),
            (torch.Tensor, "backward", self.timed(BACKWARD, backward)),
            (torch.nn.utils, "clip_grad_norm_", self.timed("clipping", clip)),
            (ours.optimizer, "step", self.timed("optimizer", ours.optimizer.step)),
            (ours.adapters, "norm", self.timed("adapter's norm", ours.adapters.norm)),
        ]
        with ExitStack() as stack:
            for owner, name, function in places:
                stack.enter_context(mock.patch.object(owner, name, function))
            yield


def _whose_pass() -> str:
    return POLICY if torch.is_grad_enabled() else REFERENCE
