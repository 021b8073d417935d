"""Atomic checkpoints: `checkpoints/step-00000100/{adapter.safetensors, optimizer.safetensors, state.json}`, and
`averaged.safetensors` where an average of the weights is what is to be used.

A checkpoint is written beside its place and renamed, so it is complete or absent; `state.json` holds checksums, so a
damaged one is recognised and the one before it used. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import UserError

FORMAT = 1
DIRECTORY = "checkpoints"
_ADAPTER, _OPTIMIZER, _AVERAGED, _STATE = (
    "adapter.safetensors",
    "optimizer.safetensors",
    "averaged.safetensors",
    "state.json",
)
_TREE = "tree"
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint after `step` optimizer steps.

    Attributes:
        rollbacks: (step of a spike, step that training went back to), in order.
    """

    path: Path
    step: int
    identity: dict[str, Any]
    versions: dict[str, str]
    rollbacks: list[tuple[int, int]] = field(default_factory=list)

    def averaged(self) -> dict[str, Tensor] | None:
        """The average of the weights, which is what is to be used; None if the run keeps none."""
        return safetensors.torch.load_file(self.path / _AVERAGED) if (self.path / _AVERAGED).exists() else None

    def adapter(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.path / _ADAPTER)

    def optimizer(self) -> dict[str, Any]:
        """What `Optimizer.load_state_dict` takes."""
        with safetensors.safe_open(self.path / _OPTIMIZER, "pt") as file:
            tree = json.loads(file.metadata()[_TREE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unflatten(tree, tensors)


def save(
    run_dir: Path | str,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    identity: Mapping[str, Any],
    averaged: Mapping[str, Tensor] | None = None,
    rollbacks: Sequence[tuple[int, int]] = (),
    keep: int | None = None,
    every: int = 1,
    besides: int | None = None,
    back: int | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the last `keep` regular ones, this one and those named.

    Args:
        adapter: names → tensors on the CPU.
        averaged: of the weights, where that is what is to be used.
        rollbacks: see `Checkpoint`.
        keep: None: remove nothing.
        every: a regular one's step is a multiple of this. What an interruption saves must not push another out, or
            the checkpoints that are there would depend on it.
        besides: that of this step is kept too.
        back: so are the regular ones after this step, and the last one that is not.
        optimizer: an optimizer's `state_dict()`.
        identity: JSON values that a resumed run must agree on.

    Raises:
        UserError: disk full or directory not writable; earlier checkpoints are untouched.
    """
    root = Path(run_dir) / DIRECTORY
    final, staging = root / f"step-{step:08d}", root / f".step-{step:08d}.partial"
    with atomic.clear_os_errors(root):
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            tensors: dict[str, Tensor] = {}
            tree = _flatten(dict(optimizer), "", tensors)
            contents = {
                _ADAPTER: safetensors.torch.save({name: t.contiguous() for name, t in adapter.items()}),
                _OPTIMIZER: safetensors.torch.save(tensors, metadata={_TREE: json.dumps(tree)}),
            }
            if averaged is not None:
                contents[_AVERAGED] = safetensors.torch.save({name: t.contiguous() for name, t in averaged.items()})
            files = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in contents.items()}
            state = {
                "format": FORMAT,
                "step": step,
                "identity": identity,
                "versions": _versions(),
                "rollbacks": [list(rollback) for rollback in rollbacks],
                "files": files,
            }
            contents[_STATE] = (json.dumps(state, indent=1) + "\n").encode()
            for name, data in contents.items():
                atomic.write(staging / name, data)
            _replace_directory(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    if keep is not None:
        # Later steps are damaged ones that `latest` passed over: they must not push good ones out.
        earlier = [number for number in steps(run_dir) if number <= step]
        regular = [number for number in earlier if number % every == 0]
        after = sum(number > back for number in regular) if back is not None else -1
        kept = {step, besides, *regular[: max(keep, after + 1)]}
        for number in set(earlier) - kept:
            shutil.rmtree(root / f"step-{number:08d}", ignore_errors=True)
    return final


def steps(run_dir: Path | str) -> list[int]:
    """Of all checkpoints, newest first."""
    return [step for step, _ in _directories(Path(run_dir) / DIRECTORY)]


def remove_after(run_dir: Path | str, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for number, path in _directories(Path(run_dir) / DIRECTORY):
        if number > step:
            shutil.rmtree(path, ignore_errors=True)


def latest(
    run_dir: Path | str, warn: Callable[[str], None], at_most: int | None = None, every: int = 1
) -> Checkpoint | None:
    """The newest intact checkpoint, or None; `warn` is told of every damaged one that is passed over.

    Args:
        at_most: of this step or an earlier one.
        every: of a multiple of this only.

    Raises:
        UserError: the newest intact one is of a later format than this version reads.
    """
    for step, path in _directories(Path(run_dir) / DIRECTORY):
        if (at_most is not None and step > at_most) or step % every:
            continue
        try:
            return _verified(step, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            warn(f"{path}: damaged checkpoint passed over ({error})")
    return None


def at(run_dir: Path | str, step: int) -> Checkpoint:
    """The checkpoint after `step` optimizer steps.

    Raises:
        UserError: there is none, or it is damaged.
    """
    found = dict(_directories(Path(run_dir) / DIRECTORY))
    if step not in found:
        there = ", ".join(str(number) for number in sorted(found)) or "none"
        raise UserError(f"no checkpoint of step {step}", where=run_dir, hint=f"there: {there}")
    try:
        return _verified(step, found[step])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"damaged checkpoint ({error})",
            where=found[step],
            hint='use another one; a run that is to end with the best one ends with evaluate.checkpoint="last" too',
        ) from None


def newest_step(run_dir: Path | str) -> int:
    """The step of the newest checkpoint, which is not looked into; 0 if there is none."""
    return max((step for step, _ in _directories(Path(run_dir) / DIRECTORY)), default=0)


def tidy(run_dir: Path | str) -> None:
    """Remove what a process that was killed while it saved has left behind; only for the directory's one process.

    Raises:
        UserError: the directory is not writable.
    """
    root = Path(run_dir) / DIRECTORY
    with atomic.clear_os_errors(root):
        for old in root.glob(".step-*.old"):  # killed between two renames: it is the checkpoint, or superseded
            final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            shutil.rmtree(old) if final.exists() else old.rename(final)
        for staging in root.glob(".step-*.partial"):
            shutil.rmtree(staging)


def require_steps(checkpoint: Checkpoint, steps: int) -> None:
    """Raise a UserError if it is beyond `steps`."""
    if checkpoint.step > steps:
        raise UserError(
            f"it has {checkpoint.step} steps already, {steps} are asked for",
            where=checkpoint.path,
            hint=f"ask for at least {checkpoint.step} steps, or give another --run-dir",
        )


def other_versions(checkpoint: Checkpoint) -> list[str]:
    """The libraries that were others when it was written, old → new."""
    now = _versions()
    return [
        f"{name} {checkpoint.versions.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted(checkpoint.versions.keys() | now.keys())
        if checkpoint.versions.get(name) != now.get(name)
    ]


def require_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raise a UserError with every key that differs, old → new, if the checkpoint belongs to another run."""
    old, new = _flat(checkpoint.identity), _flat(json.loads(json.dumps(identity)))
    differing = [
        f"{key}: {json.dumps(old.get(key, 'absent'))} → {json.dumps(new.get(key, 'absent'))}"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
    ]
    if differing:
        raise UserError(
            f"this run directory belongs to another run: {'; '.join(differing)}",
            where=checkpoint.path,
            hint="give another --run-dir, or undo these changes to resume",
        )


def _directories(root: Path) -> list[tuple[int, Path]]:
    """Newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP_NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _verified(step: int, path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_bytes())
    if state["format"] > FORMAT:
        raise UserError(
            f"checkpoint format {state['format']} is newer than this version reads ({FORMAT})",
            where=path,
            hint="use the version of lora-dpo that wrote it, or a later one",
        )
    if state["step"] != step:
        raise ValueError(f"it says step {state['step']}")
    if set(state["files"]) not in ({_ADAPTER, _OPTIMIZER}, {_ADAPTER, _OPTIMIZER, _AVERAGED}):
        raise ValueError("its list of files is wrong")
    for name, file in state["files"].items():
        data = (path / name).read_bytes()
        if len(data) != file["bytes"]:
            raise ValueError(f"{name} has {len(data)} bytes of {file['bytes']}")
        if _sha256(data) != file["sha256"]:
            raise ValueError(f"{name} has another checksum")
    rollbacks = [(int(bad), int(good)) for bad, good in state.get("rollbacks", [])]
    return Checkpoint(path, step, dict(state["identity"]), dict(state["versions"]), rollbacks)


def _replace_directory(staging: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    atomic.sync_directory(staging)
    if final.exists():  # a directory can't be renamed over a full one
        os.rename(final, old)
    os.rename(staging, final)
    atomic.sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lora-dpo", "torch", "diffusers", "peft", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    """A JSON tree of [kind, content] that keeps what JSON loses: tuples, integer keys, and tensors by name."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", path]
    if isinstance(value, Mapping):
        return ["dict", [[key, _flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]]
    return ["value", value]


def _unflatten(node: list[Any], tensors: Mapping[str, Tensor]) -> Any:
    kind, content = node
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _unflatten(item, tensors) for key, item in content}
        case "tuple":
            return tuple(_unflatten(item, tensors) for item in content)
        case "list":
            return [_unflatten(item, tensors) for item in content]
    return content
