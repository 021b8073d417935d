"""Settings that fit into so much memory: what costs least time is tried first, and each is traced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_dpo import atomic, memory
from lora_dpo.errors import UserError
from lora_dpo.fake_device import Kind
from lora_dpo.memory import DECODING, GIB, HELD_OUT, SAMPLING, TRAINING, Estimate
from lora_dpo.recipe import Recipe
from lora_dpo.recompute import Policy
from lora_dpo.run_dir import RECOMPUTED

# Of the search for the number of blocks: it ends within an eighth of them.
HALVINGS = 3
RESOLUTION_STEP = 64
QUANTIZATIONS = ("none", "int8", "nf4")  # from large to small


def settled(recipe: Recipe, policy: Policy) -> Recipe:
    """The recipe with this in the place of `gradient_checkpointing = "auto"`."""
    return with_changes(recipe, {"train.gradient_checkpointing": policy, "train.memory_budget_gb": None})


def automatic(recipe: Recipe, run_dir: Path, device: torch.device, tell: Callable[[str], None]) -> Policy:
    """What `gradient_checkpointing = "auto"` comes to in this run: chosen once, and kept in its directory.

    It is chosen anew where the run goes on with another budget, or with passes of another size.

    Args:
        device: without networks on it.
        tell: called with a line on the choice.

    Raises:
        UserError: there is no budget, or an optimizer step doesn't fit even with all blocks computed again.
    """
    file, chosen = run_dir / RECOMPUTED, recipe.train
    asked = chosen.model_dump(include={"memory_budget_gb", "micro_batch_pairs", "pair_pass"}) | {"device": device.type}
    held = _held(file)
    if held.get("asked") == asked:
        return held["gradient_checkpointing"]
    kind: Kind = "cuda" if device.type == "cuda" else "cpu"
    budget = _budget(recipe, device)
    tell('tracing an optimizer step, for gradient_checkpointing = "auto"')
    found = fewest_recomputed(recipe, budget, kind)
    if found is None:
        raise UserError(
            f"a step needs more than {budget / GIB:.2f} GiB even with all activations computed again",
            where="train.memory_budget_gb" if chosen.memory_budget_gb is not None else "train.gradient_checkpointing",
            hint=f"`lora-dpo plan RECIPE --gpu {budget / GIB:.1f}GB` tells what fits",
        )
    policy, needed = found
    document = {
        "gradient_checkpointing": policy,
        "needed_gib": needed / GIB,
        "budget_gib": budget / GIB,
        "asked": asked,
    }
    atomic.replace(file, (json.dumps(document, indent=1) + "\n").encode())
    words = {"none": "no activations are", "full": "all activations are"}
    what = words.get(str(policy), f"activations of {policy} blocks are")
    tell(f"{what} computed again: a step needs {needed / GIB:.2f} of {budget / GIB:.2f} GiB")
    return policy


def _held(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) and "gradient_checkpointing" in held else {}


def _budget(recipe: Recipe, device: torch.device) -> int:
    if recipe.train.memory_budget_gb is not None:
        return int(recipe.train.memory_budget_gb * GIB)
    if device.type != "cuda":
        raise UserError(
            f"it has to be given on this device ({device.type})",
            where="train.memory_budget_gb",
            hint='or give gradient_checkpointing = "none", "full" or a number of blocks',
        )
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free + memory.CONTEXT_BYTES  # which is taken already, and which the traced need has in it


def fewest_recomputed(recipe: Recipe, room: int, device: Kind) -> tuple[Policy, int] | None:
    """The fastest `train.gradient_checkpointing` with which an optimizer step fits, and the bytes that it needs.

    Blocks that are computed again cost time, each of them, and free memory, each of them; so the fewest are looked for.
    None where not even "full" fits.

    Args:
        room: bytes.
    """

    def needed(policy: Policy) -> Estimate:
        return memory.estimate(with_changes(recipe, {"train.gradient_checkpointing": policy}), device, TRAINING)

    full = needed("full")
    if full.needed() > room:
        return None
    plain = needed("none").needed()
    if plain <= room:
        return "none", plain
    best: tuple[Policy, int] = ("full", full.needed())
    low, high = 0, full.blocks
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        found = needed(middle).needed()
        if found <= room:
            best, high = (middle, found), middle
        else:
            low = middle
    return best


@dataclass(frozen=True)
class Fitting:
    """Changes to a recipe.

    Attributes:
        overrides: key → value.
        needed: bytes, of the changed recipe.
        too_large: the phase that is too large still; None: it fits.
    """

    overrides: dict[str, Any]
    needed: int
    too_large: str | None = None

    def arguments(self) -> list[str]:
        """As the command line takes them."""
        return [f"{key}={value}" for key, value in self.overrides.items()]


def nearest(recipe: Recipe, room: int, estimated: Estimate, tell: Callable[[str], None]) -> Fitting:
    """The nearest recipe that fits: first what costs next to no time, at last what changes what is learned.

    For training, in this order: fewer pairs a pass; one image at a time; blocks computed again; an optimizer with a
    state in 8 bits; a base in bfloat16, then its attention layers in int8, then in nf4; fewer pixels. For the
    evaluation: fewer pictures a batch, then none. What is found is traced as a whole.

    Args:
        room: bytes.
        estimated: of the recipe.
        tell: called with what is tried.
    """
    search = _Search(recipe, room, estimated, tell)
    search.training()
    search.evaluation()
    whole = memory.estimate(search.recipe, estimated.device)
    return Fitting(search.overrides, whole.needed(), None if whole.needed() <= room else whole.highest())


class _Search:
    def __init__(self, recipe: Recipe, room: int, estimated: Estimate, tell: Callable[[str], None]) -> None:
        self._given, self._room, self._estimated, self._tell = recipe, room, estimated, tell
        self._device: Kind = estimated.device
        self.overrides: dict[str, Any] = {}

    @property
    def recipe(self) -> Recipe:
        return with_changes(self._given, self.overrides)

    def training(self) -> None:
        if self._fits({}):
            return
        for fitted in (
            self._smaller_passes,
            self._one_image_at_a_time,
            self._computed_again,
            self._smaller_weights,
            self._fewer_pixels,
        ):
            if fitted():
                return

    def evaluation(self) -> None:
        """Pictures are drawn in batches of fewer, or not at all."""
        chosen = self.recipe.evaluate
        if not chosen.prompts:
            return
        for batch in (chosen.batch, *_halves(chosen.batch)):
            changes = {} if batch == chosen.batch else {"evaluate.batch": batch}
            if self._fits(changes, (SAMPLING, DECODING)):
                self.overrides |= changes
                return
        self.overrides |= {"evaluate.prompts": 0}

    def _smaller_passes(self) -> bool:
        train = self.recipe.train
        if train.pair_pass == "split":  # the size of a pass has no effect then
            return False
        now = train.micro_batch_pairs or train.batch_pairs
        smaller = [size for size in range(1, now) if train.batch_pairs % size == 0]
        if not smaller:
            return False
        return self._largest("train.micro_batch_pairs", smaller)

    def _one_image_at_a_time(self) -> bool:
        return self.recipe.train.pair_pass == "plain" and self._take({"train.pair_pass": "split"})

    def _computed_again(self) -> bool:
        """Fewer blocks than were asked for may do now; more are taken, if they don't."""
        found = fewest_recomputed(self.recipe, self._room, self._device)
        policy = "full" if found is None else found[0]
        if policy != self.recipe.train.gradient_checkpointing:
            self._tell(f"train.gradient_checkpointing={policy}")
            self.overrides["train.gradient_checkpointing"] = policy
        return found is not None

    def _smaller_weights(self) -> bool:
        for changes in self._savings():
            if self._take(changes):
                self._computed_again()
                return True
        return False

    def _savings(self) -> Iterator[dict[str, Any]]:
        if self.recipe.train.optimizer == "adamw":
            yield {"train.optimizer": "adamw8bit"}
        if self.recipe.base.dtype == "float32":
            yield {"base.dtype": "bfloat16", "train.precision": "bfloat16"}
        for kind in QUANTIZATIONS[QUANTIZATIONS.index(self.recipe.base.quantization) + 1 :]:
            yield {"base.quantization": kind}

    def _fewer_pixels(self) -> bool:
        given = self.recipe.data.resolution
        smaller = [given * share // 4 // RESOLUTION_STEP * RESOLUTION_STEP for share in (3, 2)]
        return any(self._take({"data.resolution": size}) for size in dict.fromkeys(smaller) if size)

    def _take(self, changes: dict[str, Any]) -> bool:
        """Whether training fits with these changes, which are kept in any case."""
        self._tell(" ".join(f"{key}={value}" for key, value in changes.items()))
        fits = self._fits(changes)
        self.overrides |= changes
        return fits

    def _largest(self, key: str, ascending: Sequence[int]) -> bool:
        """Takes the largest value with which training fits, else the first."""
        fits, above = 0, len(ascending)
        if not self._take({key: ascending[0]}):
            return False
        while above - fits > 1:
            middle = (fits + above) // 2
            if self._fits({key: ascending[middle]}):
                fits = middle
            else:
                above = middle
        self.overrides[key] = ascending[fits]
        return True

    def _fits(self, changes: dict[str, Any], among: Sequence[str] = (*TRAINING, HELD_OUT)) -> bool:
        if not self.overrides and not changes:
            return self._estimated.needed(among) <= self._room
        changed = with_changes(self.recipe, changes)
        return memory.estimate(changed, self._device, among).needed() <= self._room


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with `section.key` replaced."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        part = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: part})
    return recipe
