"""Runs of the command line on the tiny world that are killed at any moment, and started again until they are done.

`python -m tests.support.killing DIRECTORY` prints one JSON line per kill, and a last one. Everything is imported once;
each run is a fork of this process, ended by a real SIGKILL. Moments are chosen in two ways: by the clock, from outside,
and at an event, from inside: just before the process opens a file for writing, renames, removes or makes one, waits
until one is on the disk, or lets the optimizer step. At such a wait the file may be torn first, as if the machine had
died while it was being written. A run ends well if its files are those of an uninterrupted one, byte for byte, but for
times and the curves' picture.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import mmap
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TIMES = {"seconds", "pairs_per_second", "peak_memory_gib", "peak_memory_gib_of", "train_seconds"}
PHASES = ("loading", "cache", "training", "checkpoint", "export", "evaluation", "report")
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fsync", "step")
# Everything that decides what the next step is: averages, draws inside a pass, measuring, the best checkpoint.
RECIPE = """
extends = "quickstart"
name = "killed"
[data]
limit = 6
caption_dropout = 0.2
[adapter]
rank = 2
dropout = 0.1
[train]
steps = {steps}
batch_pairs = 2
micro_batch_pairs = 1
save_every_steps = 2
keep_checkpoints = 1
ema_decay = 0.8
device = "cpu"
[evaluate]
prompts = 0
implicit_pairs = 1
every_steps = 3
every_steps_pairs = 1
checkpoint = "best"
scorer = "none"
"""


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        seconds: after the start.
        number, phase: or at this event, counted from 1, of the phase or of all.
        torn: at the next wait for the disk, that is, and with the file cut.
    """

    seconds: float | None = None
    number: int = 0
    phase: str | None = None
    torn: bool = False

    def is_of(self, phase: str) -> bool:
        return self.phase in (None, phase)


@dataclass
class Death:
    """A kill that happened: how the moment was chosen, what the run was doing, and the last event before."""

    chosen: str
    phase: str
    event: str
    torn: bool


@dataclass
class Outcome:
    """One run directory, from its first start to its end."""

    deaths: list[Death] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


class _Board:
    """A page that a run and its killer share: the phase, the last event, and how many there were, of each phase too."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4096)

    def clear(self) -> None:
        self._page[:] = bytes(4096)

    def enter(self, phase: int) -> int:
        """The phase before."""
        before, self._page[0] = self._page[0], phase
        return before

    def happened(self, event: str) -> tuple[int, int]:
        """How many events there are now, and how many of this phase."""
        self._page[1] = EVENTS.index(event)
        return self._add(0), self._add(1 + self._page[0])

    def torn(self) -> None:
        self._page[2] = 1

    def read(self) -> tuple[str, str, bool]:
        """The phase, the last event, and whether a file was torn."""
        return PHASES[self._page[0]], EVENTS[self._page[1]] if self.count() else "none", bool(self._page[2])

    def count(self, phase: str | None = None) -> int:
        place = 0 if phase is None else 1 + PHASES.index(phase)
        return int.from_bytes(self._page[8 + 8 * place : 16 + 8 * place], "little")

    def _add(self, place: int) -> int:
        where = slice(8 + 8 * place, 16 + 8 * place)
        count = int.from_bytes(self._page[where], "little") + 1
        self._page[where] = count.to_bytes(8, "little")
        return count


class Killing:
    """The runs of one recipe below `directory`, each with a cache of its own."""

    def __init__(self, directory: Path, steps: int = 5) -> None:
        self.directory, self._board = directory, _Board()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "killed.toml").write_text(RECIPE.format(steps=steps), "utf-8")
        self.whole = directory / "whole"
        began = time.monotonic()
        code = self._fork(self._learn_modules)
        self.seconds = time.monotonic() - began
        assert code == 0, (directory / "output.txt").read_text()
        self.events = {None: self._board.count()} | {phase: self._board.count(phase) for phase in PHASES}
        for name in (directory / "modules.txt").read_text().split():
            if name not in sys.modules:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()

    def chain(self, name: str, moments: Iterable[Moment]) -> Outcome:
        """A run that is killed at one moment after another, and in the end left alone."""
        where, outcome = self.directory / name, Outcome()
        for moment in (*moments, None):
            code = self._fork(lambda m=moment: self._run(where, m), moment)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                outcome.differences.append(f"exit code {code}: {(self.directory / 'output.txt').read_text()[-2000:]}")
                return outcome
            assert moment is not None
            phase, event, torn = self._board.read()
            outcome.deaths.append(Death("clock" if moment.seconds is not None else "event", phase, event, torn))
        outcome.differences += differences(self.whole, where)
        shutil.rmtree(where)
        return outcome

    def _fork(self, work: Callable[[], None], moment: Moment | None = None) -> int:
        """Exit code of a child that does `work`, negative if it was killed, at a moment of the clock from here."""
        seconds = None if moment is None else moment.seconds
        self._board.clear()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with (self.directory / "output.txt").open("w") as output:
                    for descriptor in (1, 2):
                        os.dup2(output.fileno(), descriptor)
                    work()
                    code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        descriptor = os.pidfd_open(pid)
        try:
            if seconds is not None and not select.select([descriptor], [], [], seconds)[0]:
                os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(descriptor)

    def _learn_modules(self) -> None:
        """The uninterrupted run, and what it imported."""
        self._run(self.whole, None)
        package = ("lora_dpo", "diffusers", "transformers", "peft", "matplotlib", "torch", "PIL", "pyarrow", "numpy")
        names = [name for name in sys.modules if name.partition(".")[0] in package and sys.modules[name] is not None]
        (self.directory / "modules.txt").write_text("\n".join(names))

    def _run(self, where: Path, moment: Moment | None) -> None:
        """In the child: the command line, with an eye on what it does."""
        self._watch(where, moment)
        from lora_dpo import cli

        os.environ["LORA_DPO_CACHE"] = str(where / "cache")
        try:
            cli.main(["train", str(self.directory / "killed.toml"), "--run-dir", str(where / "run"), "--quiet"])
        except SystemExit as error:
            if error.code:
                raise

    def _watch(self, where: Path, moment: Moment | None) -> None:
        import torch

        from lora_dpo import build, cache_fill, checkpoint, completion, export, kohya, run_dir

        board, below = self._board, str(where)

        def happen(name: str, descriptor: int | None = None) -> None:
            counts = board.happened(name)
            if moment is None or not moment.number or not moment.is_of(board.read()[0]):
                return
            beyond = counts[moment.phase is not None] - moment.number
            if moment.torn and beyond >= 0 and descriptor is not None and _tear(descriptor):
                board.torn()
            elif beyond != 0 or moment.torn:
                return
            os.kill(os.getpid(), signal.SIGKILL)

        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            if name not in EVENTS or not str(arguments[0]).startswith(below):
                return
            if name != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                happen(name)

        def entering(owner: object, name: str, phase: str) -> None:
            real = getattr(owner, name)

            def entered(*args: Any, **kwargs: Any) -> Any:
                before = board.enter(PHASES.index(phase))
                value = real(*args, **kwargs)
                board.enter(before)
                return value

            setattr(owner, name, entered)

        for owner, name, phase in (
            (cache_fill, "encode_images", "cache"),
            (cache_fill, "encode_prompts", "cache"),
            (build, "train", "training"),
            (checkpoint, "save", "checkpoint"),
            (export, "save", "export"),
            (kohya, "save", "export"),
            (export, "verify", "export"),
            (completion, "held_out", "evaluation"),
            (completion.figures, "curves", "report"),
            (completion, "write_card", "report"),
            (run_dir, "finish", "report"),
        ):
            entering(owner, name, phase)

        sync, step = os.fsync, torch.optim.AdamW.step

        def fsync(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(below):
                happen("fsync", descriptor)
            sync(descriptor)

        def steps(self: Any, *args: Any, **kwargs: Any) -> Any:
            happen("step")
            return step(self, *args, **kwargs)

        os.fsync = fsync
        torch.optim.AdamW.step = steps
        sys.addaudithook(hook)


def _tear(descriptor: int) -> bool:
    """Cuts what was not yet on the disk: half of a new file, the end of one that is appended to."""
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if not path.is_file():
        return False
    size = path.stat().st_size
    os.ftruncate(descriptor, size - min(size, 7) if path.name == "metrics.jsonl" else size // 2)
    return True


def differences(one: Path, other: Path) -> list[str]:
    """Files that only one of two finished runs has, or in which they differ in more than times."""
    held = [
        {p.relative_to(d).as_posix() for p in d.rglob("*") if p.is_file() and not _may_be_left(p)} for d in (one, other)
    ]
    found = [f"{name}: in one only" for name in sorted(held[0] ^ held[1])]
    for name in sorted(held[0] & held[1]):
        if name != "run/curves.png" and _content(one / name, one) != _content(other / name, other):
            found.append(f"{name}: differs")
    return found


def _may_be_left(path: Path) -> bool:
    """What a killed process leaves in a cache, which may have other users; and what is remembered of files' times."""
    return "cache" in path.parts and path.name.startswith((".", "file-digests"))


def _content(path: Path, directory: Path) -> Any:
    from lora_dpo.export import _in_order

    data = path.read_bytes().replace(str(directory).encode(), b"@")
    if path.suffix == ".safetensors" and "cache" in path.parts:
        return _in_order(data)  # its header's order changes from call to call
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in data.splitlines()]
    if path.name == "result.json":
        return _timeless(json.loads(data))
    if path.suffix == ".md":
        return [line for line in data.splitlines() if not line.startswith((b"| time |", b"| peak memory |"))]
    return data


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def random_chains(killing: Killing, kills: int, seed: int) -> Iterator[Outcome]:
    """Runs that are killed in one phase after the other, the later ones by the clock in between, until `kills`."""
    made = 0
    for number in itertools.count():
        if made >= kills:
            return
        generator, moments = random.Random(f"{seed} {number}"), []
        for phase in PHASES:
            # What an earlier life has done doesn't come again: later ones have fewer events.
            if most := -(-killing.events[phase] // 4):
                moments.append(Moment(number=generator.randint(1, most), phase=phase, torn=generator.random() < 0.3))
            if number and generator.random() < 0.5:
                moments.append(Moment(seconds=generator.uniform(0, killing.seconds / 4)))
        outcome = killing.chain(f"random-{number}", moments[: kills - made])
        made += len(outcome.deaths)
        yield outcome


def every_event(killing: Killing, every: int) -> Iterator[Outcome]:
    """A run per event of the uninterrupted one, killed there; and one torn there, where that makes a difference."""
    for number in range(1, killing.events[None] + 1, every):
        outcome = killing.chain(f"event-{number}", [Moment(number=number)])
        yield outcome
        if any(death.event == "fsync" for death in outcome.deaths):
            yield killing.chain(f"torn-{number}", [Moment(number=number, torn=True)])


def by_the_clock(killing: Killing, kills: int, seed: int) -> Iterator[Outcome]:
    """Runs that are killed once each, at any time."""
    generator = random.Random(seed)
    for number in range(kills):
        yield killing.chain(f"clock-{number}", [Moment(seconds=generator.uniform(0, killing.seconds))])


def main() -> None:
    # Before torch is imported: threads don't survive a fork, and rounding depends on their number.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=0, help="of runs that are killed in one phase after the other")
    parser.add_argument("--clock", type=int, default=0, help="runs that are killed once, at any time")
    parser.add_argument("--every", type=int, default=0, help="a run killed at every so-many-th event")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a run")
    chosen = parser.parse_args()
    began = time.monotonic()
    killing = Killing(chosen.directory, chosen.steps)
    phases: Counter[str] = Counter()
    events: Counter[str] = Counter()
    runs, different = 0, []
    outcomes = [random_chains(killing, chosen.kills, chosen.seed), by_the_clock(killing, chosen.clock, chosen.seed)]
    if chosen.every:
        outcomes.append(every_event(killing, chosen.every))
    for outcome in itertools.chain(*outcomes):
        runs += 1
        different += outcome.differences
        for death in outcome.deaths:
            phases[death.phase] += 1
            events[f"torn {death.event}" if death.torn else death.event] += 1
        print(json.dumps(asdict(outcome)), flush=True)
    document = {
        "kills": sum(phases.values()), "runs": runs, "different": different, "phases": dict(phases),
        "last_events": dict(events), "events_of_a_run": {phase or "all": n for phase, n in killing.events.items()},
        "seconds_of_a_run": round(killing.seconds, 2), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(json.dumps(document))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
