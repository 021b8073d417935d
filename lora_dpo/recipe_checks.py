"""Contradictions between a recipe's keys, and files that it names and that aren't there.

The checks see raw values over defaults, so that they report even while other keys are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_dpo import buckets
from lora_dpo.recipe_errors import shown
from lora_dpo.recipe_methods import OF_MARGIN
from lora_dpo.recipe_toml import Key

TINYWORLD = "tinyworld"
SINGLE_FILE = ".safetensors"
Found = Iterator[tuple[Key, str]]


def contradictions(values: dict[str, Any], wrong: set[Key], default: Callable[[str, str, object], Any]) -> Found:
    """(key, message) of everything found; checks that need a key in `wrong` are left out.

    Args:
        values: the recipe's tables as written.
        wrong: keys that have been reported already.
        default: the default of (section, key, the section's kind); KeyError if there is none.
    """
    view = _View(values, {key[:2] for key in wrong}, default)
    for check in _CHECKS:
        try:
            yield from check(view)
        except _Unusable:
            continue


def may_be_hub_id(value: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) is not None and not value.endswith(SINGLE_FILE)


class _Unusable(Exception):
    """A check asked for a key that is wrong or missing."""


class _View:
    """Raw values over defaults, by dotted key."""

    def __init__(self, values: dict[str, Any], wrong: set[Key], default: Callable[[str, str, object], Any]) -> None:
        self._values, self._wrong, self._default = values, wrong, default

    def __getitem__(self, dotted: str) -> Any:
        section, name = dotted.split(".")
        table = self._values.get(section, {})
        if (section,) in self._wrong or (section, name) in self._wrong or not isinstance(table, dict):
            raise _Unusable
        if name in table:
            return table[name]
        try:
            return self._default(section, name, table.get("kind"))
        except KeyError:
            raise _Unusable from None

    def changed(self, dotted: str) -> bool:
        """Whether a key with a default has another value."""
        section, name = dotted.split(".")
        return self[dotted] != self._default(section, name, None)


def _micro_batch(view: _View) -> Found:
    batch, micro = view["train.batch_pairs"], view["train.micro_batch_pairs"]
    if micro is not None and batch % micro:
        yield ("train", "micro_batch_pairs"), f"got {micro}, expected a divisor of train.batch_pairs = {batch}"


def _timesteps(view: _View) -> Found:
    low, high = view["method.timestep_range"] or (0, 1)
    if low >= high:
        yield ("method", "timestep_range"), f"got [{low}, {high}], expected low < high"


def _reference_cache(view: _View) -> Found:
    if view["method.reference_cache"] and view["method.visits_per_pair"] is None:
        yield (
            ("method", "reference_cache"),
            "no draw comes twice, as long as their number isn't bounded: give method.visits_per_pair = 4, for instance",
        )


def _labels(view: _View) -> Found:
    if view["method.label_smoothing"] and view["method.label_noise"]:
        yield ("method", "label_noise"), "label_smoothing is set too: labels are smoothed or corrected, not both"


def _ties(view: _View) -> Found:
    kind = view["method.kind"]
    if view["data.ties"] == "half" and kind not in OF_MARGIN:
        yield (
            ("data", "ties"),
            f"method.kind = {shown(kind)} needs a winner in every pair; {', '.join(OF_MARGIN)} can do without",
        )


def _min_snr(view: _View) -> Found:
    if view["method.min_snr_gamma"] is not None and view["method.timestep_weight"] != "min_snr":
        yield (
            ("method", "min_snr_gamma"),
            f'method.timestep_weight is {shown(view["method.timestep_weight"])}, not "min_snr"',
        )


def _splits(view: _View) -> Found:
    if view["data.split"] == view["data.heldout_split"]:
        yield (
            ("data", "heldout_split"),
            f"got {shown(view['data.split'])}, which is data.split too: nothing is held out",
        )


def _columns(view: _View) -> Found:
    kind = view["data.kind"]
    if kind != "pickapic" and view["data.columns"]:
        yield ("data", "columns"), f"data.kind = {shown(kind)} has no columns (they belong to pickapic)"
    if kind != "hpdv2" and view.changed("data.pairs_of_ranking"):
        yield ("data", "pairs_of_ranking"), f"data.kind = {shown(kind)} has no rankings (they belong to hpdv2)"


def _scorer(view: _View) -> Found:
    if view["evaluate.scorer"] == TINYWORLD and view["base.model"] != TINYWORLD:
        yield (
            ("evaluate", "scorer"),
            'the tinyworld scorer understands the tiny world\'s pictures only: give scorer = "none"',
        )


def _buckets(view: _View) -> Found:
    step, aspect = view["data.bucket_step_pixels"], view["data.max_aspect"]
    if view["data.aspect"] == "square":
        for name in ("bucket_step_pixels", "max_aspect"):
            if view.changed(f"data.{name}"):
                yield ("data", name), 'it has no effect on squares: give aspect = "buckets", or leave it out'
        return
    resolution = view["data.resolution"]
    if resolution % step:
        yield ("data", "bucket_step_pixels"), f"got {step}, expected a divisor of data.resolution = {resolution}"
    elif len(buckets.sizes(resolution, step, aspect)) == 1:
        yield (
            ("data", "aspect"),
            f"in steps of {step} up to {aspect:g}:1 there is no bucket but the square of {resolution}: "
            "give a smaller data.bucket_step_pixels or a larger data.max_aspect",
        )


def _data_exists(view: _View) -> Found:
    path = view["data.path"]
    if path != TINYWORLD and not Path(path).exists():
        yield ("data", "path"), f"{path} doesn't exist"


def _prompts_exist(view: _View) -> Found:
    path = view["evaluate.prompts_file"]
    if path is not None and not Path(path).is_file():
        yield ("evaluate", "prompts_file"), f"{path} is not a file"


def _model_exists(view: _View) -> Found:
    for name in ("model", "vae", "config"):
        value = view[f"base.{name}"]
        if value is None or (name == "model" and value == TINYWORLD) or may_be_hub_id(value):
            continue
        if name != "config" and value.endswith(SINGLE_FILE) and not Path(value).is_dir():
            if not Path(value).is_file():
                yield ("base", name), f"{value} doesn't exist"
        elif not Path(value).is_dir():
            yield ("base", name), f"{value} is neither a folder nor a hub id (owner/name)"


def _start_exists(view: _View) -> Found:
    path = view["adapter.start"]
    if path is not None and not Path(path).exists():
        yield ("adapter", "start"), f"{path} doesn't exist"


def _reference(view: _View) -> Found:
    if view["method.reference"] == "adapter" and view["adapter.start"] is None:
        yield ("method", "reference"), 'got "adapter", but adapter.start names none'


def _config_of_a_single_file(view: _View) -> Found:
    if view["base.config"] is not None and not view["base.model"].endswith(SINGLE_FILE):
        yield ("base", "config"), f"only a single-file checkpoint ({SINGLE_FILE}) takes one: a folder has its own"


def _tinyworld_family(view: _View) -> Found:
    if view["base.model"] == TINYWORLD and view["base.family"] != "sdxl":
        yield ("base", "family"), f'got {shown(view["base.family"])}, but base.model = "tinyworld" is of family "sdxl"'


def _optimizer(view: _View) -> Found:
    kind, rate = view["train.optimizer"], view["train.learning_rate"]
    if kind == "prodigy" and rate < 0.01:
        yield (
            ("train", "learning_rate"),
            f"got {rate:g}: prodigy finds the step size itself and takes this as its multiplier, normally 1",
        )
    if kind == "schedule_free_adamw" and view["train.schedule"] != "constant":
        yield (
            ("train", "schedule"),
            f'got {shown(view["train.schedule"])}: a schedule-free optimizer wants "constant" (warm-up is fine)',
        )


def _spike(view: _View) -> Found:
    if 0 < view["train.spike_factor"] <= 1:
        yield (
            ("train", "spike_factor"),
            f"got {view['train.spike_factor']:g}: a fresh adapter is at 1; give more, or 0 for never",
        )


def _ema(view: _View) -> Found:
    if view["train.ema_decay"] is not None and view["train.optimizer"] == "schedule_free_adamw":
        yield ("train", "ema_decay"), "schedule_free_adamw averages the weights itself: leave one of the two out"


def _memory_budget(view: _View) -> Found:
    automatic, budget = view["train.gradient_checkpointing"] == "auto", view["train.memory_budget_gb"]
    if budget is not None and not automatic:
        yield ("train", "memory_budget_gb"), 'it has no effect but with gradient_checkpointing = "auto"'
    if automatic and budget is None and view["train.device"] == "cpu":
        yield (
            ("train", "memory_budget_gb"),
            'gradient_checkpointing = "auto" needs it on a CPU, whose memory other programs share',
        )


def _held_out(view: _View) -> Found:
    every = view["evaluate.every_steps"]
    if every is None and view["evaluate.checkpoint"] == "best":
        yield ("evaluate", "checkpoint"), "the best step is known only with evaluate.every_steps"
    if every is not None and not view["evaluate.implicit_pairs"]:
        yield ("evaluate", "every_steps"), "there are no held-out pairs to measure: evaluate.implicit_pairs is 0"


_CHECKS: tuple[Callable[[_View], Found], ...] = (
    _micro_batch, _timesteps, _reference_cache, _labels, _ties, _min_snr, _splits, _columns, _scorer,
    _buckets,
    _data_exists, _prompts_exist, _model_exists, _start_exists, _reference, _config_of_a_single_file,
    _tinyworld_family, _optimizer, _spike, _ema, _memory_budget, _held_out,
)  # fmt: skip
