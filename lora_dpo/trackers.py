"""The lines of `metrics.jsonl` in other places too: TensorBoard, Weights & Biases, trackio, MLflow, by accelerate.

`metrics.jsonl` stays the record: a tracker that fails while training is dropped with a line, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lora_dpo import atomic
from lora_dpo.errors import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

IDS = "trackers.json"
TENSORBOARD = "tensorboard"
PACKAGES = {TENSORBOARD: "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


def require(names: Sequence[str]) -> None:
    """Every tracker's package is installed; nothing is imported.

    Raises:
        UserError: of the first one that isn't.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"the tracker {name} needs the package {PACKAGES[name]}, which is not installed",
                where="output.trackers",
                hint=f'pip install "lora-dpo[{name}]", or leave it out',
            )


class Trackers:
    """Scope in which `log` sends a step's numbers on. One per run and call, in one process.

    A resumed run goes on in the trackers' same run: its identifiers are kept in `trackers.json`. Steps that are made
    again after a resume or a rollback replace the old ones in TensorBoard. W&B ignores them; trackio and MLflow show
    both.

    Args:
        names: of `PACKAGES`.
        run_dir: TensorBoard's and W&B's files go below it.
        project, name: what the trackers call the experiment and the run.
        config: the recipe's tables.
        tell: gets a line when a tracker fails.

    Raises:
        UserError: on entering: a tracker can't be started, for want of a login for instance.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        run_dir: Path,
        project: str,
        name: str,
        config: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._names, self._run_dir, self._project, self._name = list(names), run_dir, project, name
        self._config, self._tell = _flat(config), tell
        self._running: dict[str, GeneralTracker] = {}
        self._last: int | None = None  # the last step that TensorBoard's file has; None: it has no file yet

    def __enter__(self) -> Trackers:
        if self._names:
            _accelerate_state()
            ids = self._ids()
            self._keep(ids)
            for name in self._names:
                try:
                    if name != TENSORBOARD:  # which starts with the first step
                        self._running[name] = self._started(name, ids)
                except Exception as error:
                    self._finish()
                    raise UserError(
                        f"the tracker {name} can't be started ({error})",
                        where="output.trackers",
                        hint="log in as its documentation says, or leave it out",
                    ) from error
            self._keep(ids)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()

    def log(self, line: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`."""
        step = int(line["step"])
        values = {name: value for name, value in line.items() if name != "step"}
        if TENSORBOARD in self._names and (self._last is None or step <= self._last):
            self._attempt(TENSORBOARD, lambda: self._restart_tensorboard(step))
        self._last = step
        for name, tracker in list(self._running.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(values, step=step))

    def _ids(self) -> dict[str, str]:
        file = self._run_dir / IDS
        try:
            return {"run": uuid.uuid4().hex[:12]} | json.loads(file.read_bytes())
        except FileNotFoundError:
            return {"run": uuid.uuid4().hex[:12]}
        except ValueError as error:
            raise UserError(f"damaged ({error})", where=file, hint="delete it: the trackers begin a new run") from None

    def _keep(self, ids: Mapping[str, str]) -> None:
        with atomic.clear_os_errors(self._run_dir):
            atomic.replace(self._run_dir / IDS, (json.dumps(ids, indent=1) + "\n").encode())

    def _started(self, name: str, ids: dict[str, str]) -> GeneralTracker:
        from accelerate import tracking

        match name:
            case "wandb":
                tracker = tracking.WandBTracker(
                    self._project, name=self._name, id=ids["run"], resume="allow", dir=str(self._run_dir),
                    config=self._config,
                )  # fmt: skip
                tracker.start()
            case "trackio":  # knows a run by its name
                tracker = tracking.TrackioTracker(
                    self._project, name=f"{self._name}-{ids['run']}", resume="allow", config=self._config
                )
                tracker.start()
            case "mlflow":
                tracker = tracking.MLflowTracker(self._project, run_id=ids.get(name), run_name=self._name)
                tracker.start()
                if name not in ids:  # its parameters can't be written twice
                    ids[name] = tracker.tracker.info.run_id
                    tracker.store_init_configuration(self._config)
            case _:
                raise ValueError(name)
        return tracker

    def _restart_tensorboard(self, step: int) -> None:
        """A new file, which makes TensorBoard forget what earlier ones hold from `step` on."""
        from accelerate.tracking import TensorBoardTracker

        if (before := self._running.pop(TENSORBOARD, None)) is not None:
            before.finish()
        tracker = TensorBoardTracker(TENSORBOARD, self._run_dir, purge_step=step)
        tracker.start()
        self._running = {TENSORBOARD: tracker, **self._running}

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._running.pop(name, None)
            self._names.remove(name)
            self._tell(f"the tracker {name} failed ({error}) and gets no more; metrics.jsonl has everything")

    def _finish(self) -> None:
        for name, tracker in list(self._running.items()):
            self._attempt(name, tracker.finish)
        self._running.clear()


def _accelerate_state() -> None:
    """accelerate's trackers write to its log, which needs its state. Of one process: no other has trackers."""
    from accelerate import PartialState

    launched = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        PartialState(cpu=True)  # without this it would choose a device
    finally:
        os.environ.update(launched)


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    flat: dict[str, str | int | float | bool] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat
