"""No key without effect: for each one in the schema, a value that changes what a run does, seen from outside.

The table below has to name every key, those of `method` once per kind that has them: a new key fails here until it is
seen to do something. Both runs of an entry share `given`, and the second has `change` too. What is compared says what
the key is for: what was learned, which passes the UNet made, which files there are, and so on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.attention import FeedForward

from lora_dpo import build, cli, completion, hub, recipe
from lora_dpo.recipe_methods import METHODS, OF_MARGIN
from lora_dpo.recipe_sections import SECTIONS, Recipe
from tests.support.hub_cache import REVISION, keep
from tests.support.models import save_random_pairs, save_random_sd, save_random_sdxl
from tests.support.single_file import save_single_file

RECIPE = """
name = "small"
[data]
path = "{world}/pairs.parquet"
heldout_fraction = 0.3
resolution = 64
[base]
family = "stable_diffusion"
model = "{world}/base"
[adapter]
rank = 2
alpha = 2.0
[method]
kind = "dpo"
[train]
steps = 2
batch_pairs = 2
learning_rate = 1e-2
device = "cpu"
[evaluate]
prompts = 0
implicit_pairs = 0
[output]
cache_dir = "{cache}"
"""
TIMES = {"seconds", "pairs_per_second", "peak_memory_gib", "train_seconds", "peak_memory_gib_of"}


@dataclass(frozen=True)
class Effect:
    """Overrides in the words of the command line, `{world}` for the folder of the inputs; `seen` compares two runs."""

    change: str
    seen: str = "learned"
    given: str = ""


# Wide, tall, and a little wide; (height, width) of both pictures.
SHAPES = [((60, 120), (50, 100)), ((90, 60), (130, 64)), ((80, 102), (84, 106))]
MIXED = "data.path={world}/mixed.parquet"
BUCKETS = f"{MIXED} data.resolution=128 data.aspect=buckets data.bucket_step_pixels=16"
PICTURES = "data.heldout_fraction=0.6 evaluate.prompts=1 evaluate.steps=2 evaluate.guidance=1"
MEASURED = "evaluate.implicit_pairs=4 evaluate.every_steps=1"
SAVED = "train.steps=4 train.save_every_steps=1 train.spike_factor=0"
TINYWORLD = (
    "data.path=tinyworld data.limit=1 train.batch_pairs=1 train.steps=1 base.family=sdxl base.model=tinyworld "
    "evaluate.prompts=1 evaluate.steps=2 evaluate.guidance=1"
)

EFFECTS: dict[str, Effect | list[Effect]] = {
    "name": Effect("name=other", "files"),
    "data.kind": Effect("data.kind=folder data.path={world}"),
    "data.path": Effect("data.path={world}/others.parquet"),
    "data.columns": Effect('data.columns={{jpg_0="jpg_1",jpg_1="jpg_0"}}'),
    "data.pairs_of_ranking": [
        Effect(f"data.pairs_of_ranking={value}", given="data.kind=hpdv2 data.path={world}/rankings.json")
        for value in ("adjacent", "best_worst")
    ],
    "data.split": Effect("data.split=more", given="data.path={world}/split.parquet data.heldout_split=kept"),
    "data.heldout_split": Effect(
        "data.heldout_split=more", "lines", f"data.path={{world}}/split.parquet data.heldout_split=kept {MEASURED}"
    ),
    "data.heldout_fraction": Effect("data.heldout_fraction=0.6"),
    "data.resolution": Effect("data.resolution=32"),
    "data.aspect": Effect("data.aspect=buckets data.bucket_step_pixels=16", given=f"{MIXED} data.resolution=128"),
    "data.bucket_step_pixels": Effect("data.bucket_step_pixels=32", given=BUCKETS),
    "data.max_aspect": Effect("data.max_aspect=1.5", given=BUCKETS),
    "data.crop": Effect("data.crop=top", given=MIXED),
    "data.small_images": Effect("data.small_images=drop", given=MIXED),
    "data.caption_dropout": Effect("data.caption_dropout=0.9"),
    "data.limit": Effect("data.limit=3"),
    "data.on_bad_image": Effect("data.on_bad_image=error", "refused", "data.path={world}/broken.parquet"),
    "data.ties": Effect("data.ties=half", given="data.path={world}/ties.parquet"),
    "base.family": Effect("base.family=sdxl base.model={world}/xl"),
    "base.model": Effect("base.model={world}/other"),
    "base.revision": Effect(f"base.revision={REVISION}", given="base.model=owner/model"),
    "base.vae": Effect("base.vae={world}/other/vae"),
    "base.config": Effect(
        "base.config={world}/v", given="base.model={world}/base.safetensors base.config={world}/base"
    ),
    "base.prediction_type": Effect("base.prediction_type=v_prediction"),
    "base.dtype": Effect("base.dtype=bfloat16"),
    "base.quantization": Effect("base.quantization=int8"),
    "adapter.rank": Effect("adapter.rank=3"),
    "adapter.alpha": Effect("adapter.alpha=8.0"),
    "adapter.targets": Effect("adapter.targets=all-linear"),
    "adapter.dropout": Effect("adapter.dropout=0.5"),
    "adapter.rslora": Effect("adapter.rslora=true"),
    "adapter.dora": Effect("adapter.dora=true"),
    "adapter.start": Effect("adapter.start={world}/started/adapter"),
    "train.seed": Effect("train.seed=1"),
    "train.steps": Effect("train.steps=3"),
    "train.batch_pairs": Effect("train.batch_pairs=3"),
    "train.micro_batch_pairs": Effect("train.micro_batch_pairs=1", "passes"),
    "train.learning_rate": Effect("train.learning_rate=2e-2"),
    "train.optimizer": [
        Effect("train.optimizer=adamw8bit", given="adapter.rank=64"),  # smaller tensors are not quantised
        Effect("train.optimizer=lion8bit"),
        Effect("train.optimizer=adafactor"),
        Effect("train.optimizer=prodigy train.learning_rate=1.0"),
        Effect("train.optimizer=schedule_free_adamw"),
    ],
    "train.weight_decay": Effect("train.weight_decay=0.5"),
    "train.schedule": [Effect(f"train.schedule={name}") for name in ("linear", "cosine")],
    "train.warmup_steps": Effect("train.warmup_steps=2"),
    "train.max_grad_norm": Effect("train.max_grad_norm=1e-9"),
    "train.ema_decay": Effect("train.ema_decay=0.5"),
    # Without a checkpoint to go back to, the run ends.
    "train.spike_factor": Effect(
        "train.spike_factor=1.001", "refused", "method.kind=sft train.steps=12 train.learning_rate=0.3"
    ),
    "train.save_every_steps": Effect("train.save_every_steps=1", "files"),
    "train.keep_checkpoints": Effect("train.keep_checkpoints=3", "files", SAVED),
    "train.gradient_checkpointing": [
        Effect(f"train.gradient_checkpointing={value}", "passes") for value in ("full", 1)
    ],
    "train.memory_budget_gb": Effect(
        "train.memory_budget_gb=1e-6", "refused", "train.gradient_checkpointing=auto train.memory_budget_gb=4"
    ),
    "train.pair_pass": Effect("train.pair_pass=split", "passes"),
    "train.precision": Effect("train.precision=bfloat16"),
    "train.device": [Effect(f"train.device={name}", "refused") for name in ("cuda", "cuda:1", "mps")],
    "evaluate.prompts": Effect("evaluate.prompts=2", "finished", PICTURES),
    "evaluate.seeds_per_prompt": Effect("evaluate.seeds_per_prompt=2", "finished", PICTURES),
    "evaluate.steps": Effect("evaluate.steps=3", "finished", PICTURES),
    "evaluate.guidance": Effect("evaluate.guidance=7", "finished", PICTURES),
    "evaluate.batch": Effect("evaluate.batch=1", "passes", f"{PICTURES} evaluate.prompts=2"),
    "evaluate.scorer": Effect("evaluate.scorer=tinyworld", "finished", TINYWORLD),
    "evaluate.prompts_file": Effect("evaluate.prompts_file={world}/prompts.txt", "finished", PICTURES),
    "evaluate.seed": Effect("evaluate.seed=1", "finished", PICTURES),
    "evaluate.implicit_pairs": Effect("evaluate.implicit_pairs=2", "finished"),
    "evaluate.every_steps": Effect("evaluate.every_steps=1", "lines", "evaluate.implicit_pairs=4"),
    "evaluate.every_steps_pairs": Effect("evaluate.every_steps_pairs=1", "lines", MEASURED),
    "evaluate.checkpoint": Effect(
        "evaluate.checkpoint=best", given=f"{MEASURED} train.steps=4 train.learning_rate=0.3 train.seed=1"
    ),
    "output.run_dir": Effect("output.run_dir=elsewhere/it", "files"),
    "output.cache_dir": Effect("output.cache_dir=elsewhere", "files"),
    "output.hub_repo": Effect("output.hub_repo=owner/adapter", "pushed"),
    "output.trackers": Effect('output.trackers=["tensorboard"]', "files"),
    "output.tracker_project": Effect("output.tracker_project=mine", "tracked", 'output.trackers=["wandb"]'),
}
# The gradient of the hinge is the same as long as no pair comes to its other side.
LONGER = "train.steps=8 train.learning_rate=0.1 data.limit=2"
# Of every method that has the key; where another one needs another value, it stands alone.
METHOD_EFFECTS = {
    "timestep_range": Effect("method.timestep_range=[0,100]"),
    "timestep_sampling": Effect("method.timestep_sampling=stratified"),
    "visits_per_pair": Effect("method.visits_per_pair=1", given="data.limit=1 train.batch_pairs=1"),
    "reference": Effect("method.reference=adapter", given=f"adapter.start={{world}}/started/adapter {LONGER}"),
    "reference_cache": Effect(
        "method.reference_cache=true", "passes", "data.limit=1 train.batch_pairs=1 method.visits_per_pair=1"
    ),
    "beta": Effect("method.beta=20.0"),
    "timestep_weight": Effect("method.timestep_weight=elbo"),
    "min_snr_gamma": Effect("method.min_snr_gamma=1.0", given="method.timestep_weight=min_snr"),
    "safeguard": Effect("method.safeguard=0.9"),
    "anchor_weight": Effect("method.anchor_weight=1000.0"),
    "sft_weight": Effect("method.sft_weight=1000.0"),
    "label_smoothing": Effect("method.label_smoothing=0.3"),
    "label_noise": Effect("method.label_noise=0.3"),
    "alpha": Effect("method.alpha=0.3"),
    "desirable_weight": Effect("method.desirable_weight=3.0"),
    "undesirable_weight": Effect("method.undesirable_weight=3.0"),
    "odds_weight": Effect("method.odds_weight=3.0"),
    "odds_scale": Effect("method.odds_scale=2.0"),
    "strength": Effect("method.strength=0.5"),
}
OF_METHODS = {
    (kind, name): METHOD_EFFECTS[name]
    for kind, model in METHODS.items()
    for name in model.model_fields
    if name != "kind"
}
KINDS = [Effect(f"method.kind={kind}") for kind in METHODS if kind != "dpo"]
AUTO_BETA = [Effect("method.beta=auto", given=f"method.kind={kind} {LONGER}") for kind in OF_MARGIN]
CASES = {
    **{
        f"{key}{f' {number}' if number else ''}": effect
        for key, effects in EFFECTS.items()
        for number, effect in enumerate(effects if isinstance(effects, list) else [effects])
    },
    **{f"method.{kind}.{name}": effect for (kind, name), effect in OF_METHODS.items()},
    **{effect.change: effect for effect in KINDS},
    **{f"{effect.change} {effect.given}": effect for effect in AUTO_BETA},
}


def test_the_table_has_every_key_of_the_schema() -> None:
    keys = {"name"} | {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    assert set(EFFECTS) == keys
    assert set(Recipe.model_fields) == {"name", "method", *SECTIONS}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    base, other = save_random_sd(folder / "base"), save_random_sd(folder / "other", seed=1)
    save_random_sd(folder / "v", prediction_type="v_prediction")
    save_random_sdxl(folder / "xl")
    save_single_file(base, folder / "base.safetensors")
    save_random_pairs(folder / "pairs.parquet", 12)
    save_random_pairs(folder / "others.parquet", 12, seed=1)
    save_random_pairs(folder / "ties.parquet", 12, ties=6)
    save_random_pairs(folder / "mixed.parquet", 12, shapes=SHAPES)
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    broken = [row | {"jpg_0": b"broken"} if number == 7 else row for number, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(broken), folder / "broken.parquet")
    splits = ["train", "kept", "more"]
    pq.write_table(
        pa.Table.from_pylist([row | {"split": splits[number % 3]} for number, row in enumerate(rows)]),
        folder / "split.parquet",
    )
    with (folder / "pairs.jsonl").open("w") as lines:
        for number, row in enumerate(rows[6:]):
            for side in (0, 1):
                (folder / f"{number}-{side}.png").write_bytes(row[f"jpg_{side}"])
            line = {"prompt": row["caption"], "winner": f"{number}-0.png", "loser": f"{number}-1.png"}
            print(json.dumps(line), file=lines)
    ranking = {"image_path": [f"{number}-{side}.png" for number in range(2) for side in (0, 1)], "rank": [2, 4, 1, 3]}
    rankings = [{"prompt": f"a ranking {number}", **ranking} for number in range(6)]
    (folder / "rankings.json").write_text(json.dumps(rankings))
    (folder / "prompts.txt").write_text("a prompt of its own\n")
    (folder / "small.toml").write_text(RECIPE.format(world=folder, cache=folder / "cache"))
    keep(folder / "hub", "owner/model", base, revision="f" * 40)
    keep(folder / "hub", "owner/model", other, branch=None)
    loaded = recipe.load(str(folder / "small.toml"), ["train.seed=3"])
    build.run(loaded, folder / "started", quiet=True)
    return folder


class Listening:
    """A `Progress` that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def start(self, *_: Any, **__: Any) -> None: ...

    advance = stop = start


@contextlib.contextmanager
def passes_of_the_unet() -> Iterator[Counter[int]]:
    """How often its blocks are called with how many pictures."""
    passes: Counter[int] = Counter()

    def count(module, args) -> None:
        if isinstance(module, FeedForward):  # neither the VAE nor the text encoders have any
            passes[len(args[0])] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


Seen = dict[str, Any]


def see(world: Path, place: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys) -> Seen:
    """`lora-dpo train` in an empty folder. What follows training is done if the recipe evaluates something."""
    seen: Seen = {"learned": {}, "tracked": [], "pushed": []}
    listening = Listening()
    complete = completion.complete

    def after_training(chosen: recipe.Recipe, *arguments: Any) -> dict[str, Any]:
        seen["learned"] = {name: weight.clone() for name, weight in arguments[2].state_dict().items()}
        if chosen.evaluate.prompts or (chosen.evaluate.implicit_pairs and chosen.evaluate.every_steps is None):
            return complete(chosen, *arguments)
        return json.loads((world / "started" / "result.json").read_bytes())

    def init(**options: Any) -> SimpleNamespace:
        seen["tracked"].append(options["project"])
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr(completion, "complete", after_training)
    monkeypatch.setattr(build, "make_progress", lambda **_: listening)
    monkeypatch.setattr(hub, "require_access", lambda repo: None)
    monkeypatch.setattr(hub, "push", lambda run_dir, repo, files: seen["pushed"].append(repo) or "")
    wandb = ModuleType("wandb")
    wandb.__dict__.update(init=init, __spec__=ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(world / "hub"))
    words = words.format(world=world)
    capsys.readouterr()
    with passes_of_the_unet() as passes, pytest.raises(SystemExit) as ended:
        cli.main(["train", str(world / "small.toml"), *shlex.split(words, posix=False)])
    said = capsys.readouterr().err
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.parent.name != "tensorboard")
    seen |= {"refused": said if ended.value.code else "", "passes": passes, "said": listening.said}
    seen["files"] = [path.relative_to(place).as_posix() for path in files]
    seen["lines"] = [
        timeless(json.loads(line)) for path in place.rglob("metrics.jsonl") for line in path.read_text().splitlines()
    ]
    seen["finished"] = [timeless(json.loads(path.read_bytes())) for path in place.rglob("result.json")]
    seen["finished"] += [path.read_bytes() for path in files if path.parent.name == "samples"]
    return seen


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMES}


@pytest.fixture
def look(world, tmp_path, monkeypatch, capsys):
    numbers = itertools.count()
    return lambda words: see(world, tmp_path / str(next(numbers)), words, monkeypatch, capsys)


def differ(one: Any, other: Any) -> bool:
    """Weights by more than rounding; all else at all."""
    if isinstance(one, dict) and one and isinstance(next(iter(one.values())), torch.Tensor):
        if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
            return True
        moved = [(one[name] - other[name]).abs().max() > 1e-4 * other[name].abs().max() for name in one]
        return any(moved)
    return one != other


REMEMBERED: dict[str, Seen] = {}  # runs that several keys are held against


@pytest.mark.parametrize("case", CASES)
def test_it_does_something(look, case: str) -> None:
    effect = CASES[case]
    given = of_kind(case, effect)
    if given not in REMEMBERED:
        REMEMBERED[given] = look(given)
    before, after = REMEMBERED[given], look(f"{given} {effect.change}".strip())
    assert not before["refused"], before["refused"]
    assert effect.seen == "refused" or not after["refused"], after["refused"]
    for what in effect.seen.split():
        assert after[what], f"nothing is seen of {what}"
        assert differ(before[what], after[what]), f"{effect.change} changed nothing of {what}"


def of_kind(case: str, effect: Effect) -> str:
    kind = re.fullmatch(r"method\.(\w+)\.\w+", case)
    return f"method.kind={kind[1]} {effect.given}".strip() if kind else effect.given


@pytest.mark.parametrize("given", ["", PICTURES, MEASURED])
def test_a_second_run_is_the_same_in_every_respect(look, given: str) -> None:
    one, other = look(given), look(given)
    assert all(one[what] for what in ("learned", "passes", "lines"))
    for what in one:
        assert not differ(one[what], other[what]), what
