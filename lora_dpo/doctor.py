"""What this machine has and what of it works, found out by trying; each finding with one line of advice.

Nothing heavy is imported before it is examined, so that a broken library is a finding and not a traceback.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from lora_dpo import __version__, run_lock, tinyworld

Status = Literal["ok", "warning", "problem"]
GIB = 2**30
REQUIRED = ("torch", "diffusers", "peft", "transformers", "accelerate")
# Package → the extra that installs it, and what for.
OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "for the 8-bit optimizers"),
    "gradio": ("app", "for lora-dpo app"),
    "prodigyopt": ("prodigy", 'for train.optimizer = "prodigy"'),
    "schedulefree": ("schedulefree", 'for train.optimizer = "schedule_free_adamw"'),
}
# What a run uses of each library: importing it finds versions that don't fit together.
USED = {
    "diffusers": ("diffusers", "UNet2DConditionModel"),
    "transformers": ("transformers", "CLIPTextModelWithProjection"),
    "peft": ("peft", "LoraConfig"),
    "accelerate": ("accelerate", "Accelerator"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group: the heading it stands under.
        status: "problem" only for what no run can do without.
        value: what was found.
        advice: what to do, or what it is good for; empty if there is nothing to say.
        figures: the numbers in `value`, for programs.
    """

    group: str
    name: str
    status: Status
    value: str
    advice: str = ""
    figures: dict[str, Any] | None = None


def examine(run_dir: Path, cache_dir: Path, *, step: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Everything, in the order of the report.

    Args:
        run_dir, cache_dir: where runs and encoded pairs go; they need not exist.
        step: told what is examined next.
    """
    found: list[Finding] = []
    for what, examination in (
        ("software", lambda: _software()),
        ("devices", lambda: _devices()),
        ("bitsandbytes", lambda: [_eight_bit()]),
        ("memory", lambda: [_memory()]),
        ("disks", lambda: _disks({"runs": run_dir, "cache": cache_dir})),
        ("hub", lambda: _hub()),
        ("tiny world", lambda: [_tiny_world()]),
    ):
        step(what)
        try:
            found += examination()
        except Exception as error:  # whatever a broken installation raises is what is asked for here
            found.append(Finding(what, what, "problem", f"{type(error).__name__}: {_line(error)}", "install it again"))
    return found


def healthy(findings: list[Finding]) -> bool:
    """Nothing is broken that a run needs."""
    return all(finding.status != "problem" for finding in findings)


def _software() -> Iterator[Finding]:
    yield Finding("software", "python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("software", "lora-dpo", "ok", f"{__version__} in {Path(__file__).parent}")
    ranges = _declared_ranges()
    for name in (*REQUIRED, *OPTIONAL):
        extra, purpose = OPTIONAL.get(name, ("", ""))
        install = f'pip install "lora-dpo[{extra}]"' if extra else f'pip install -U "{name}{ranges.get(name, "")}"'
        bad: Status = "warning" if extra else "problem"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("software", name, "ok" if extra else bad, "not installed", f"{install}  {purpose}".rstrip())
            continue
        if name in ranges and not _within(version, ranges[name]):
            yield Finding("software", name, bad, f"{version}, outside {ranges[name]}", install)
        elif reason := _import_error(*USED[name]) if name in USED else "":
            yield Finding("software", name, bad, f"{version} can't be used: {reason}", install)
        else:
            yield Finding("software", name, "ok", version)


def _devices() -> Iterator[Finding]:
    import torch

    cores = f"{_cores()} cores, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    reason = _trial("cpu")
    if reason:
        yield Finding("devices", "cpu", "problem", f"a training step fails: {reason}", "install torch again")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield _cuda(index)
    accelerated = torch.cuda.is_available()
    if torch.backends.mps.is_available():
        accelerated = True
        reason = _trial("mps")
        advice = 'set train.device = "cpu"' if reason else ""
        value = f"a training step fails: {reason}" if reason else "Apple GPU, shares the machine's memory"
        yield Finding("devices", "mps", "warning" if reason else "ok", value, advice)
    advice = ""
    if not accelerated:
        advice = "no GPU for torch: the tiny world trains in minutes, real base models need one"
        if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
            advice = f"an NVIDIA card is here, but torch {torch.__version__} can't use it: install torch for its CUDA"
    if not reason or accelerated:
        yield Finding("devices", "cpu", "warning" if advice else "ok", cores, advice)


def _cuda(index: int) -> Finding:
    import torch

    device = f"cuda:{index}"
    about = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        reason = _trial(device)
    except RuntimeError as error:
        free, total, reason = 0, about.total_memory, _line(error)
    bf16 = about.major >= 8  # torch says yes to older cards too, which emulate it
    value = f"{about.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, bfloat16 {'yes' if bf16 else 'no'}"
    figures = {"free_gib": round(free / GIB, 2), "total_gib": round(total / GIB, 2), "bfloat16": bf16}
    if reason:
        advice = "install the torch build that fits its driver and generation, or hide it with CUDA_VISIBLE_DEVICES"
        return Finding("devices", device, "problem", f"{value}; a training step fails: {reason}", advice, figures)
    if free < 0.7 * total:
        advice = "other processes hold the rest; nvidia-smi shows which"
        return Finding("devices", device, "warning", value, advice, figures)
    advice = "" if bf16 else 'leave base.dtype and train.precision at "float32", or load the base in float16'
    return Finding("devices", device, "ok", value, advice, figures)


def _trial(device: str) -> str:
    """What goes wrong in a small forward and backward pass; empty if nothing does."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            weight = torch.randn(64, 64, device=device, requires_grad=True)
            (weight @ weight).square().mean().backward()
            return "" if weight.grad is not None and bool(weight.grad.isfinite().all()) else "its gradient isn't finite"
    except Exception as error:
        return _line(error)


def _eight_bit() -> Finding:
    """Really makes steps: an installation that imports may still lack the kernels for this card."""
    import torch

    from lora_dpo import optimizers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, advice = "8-bit optimizers", 'use train.optimizer = "adamw", or pip install -U bitsandbytes'
    kinds: list[optimizers.Kind] = ["adamw8bit", "lion8bit"]
    try:
        if metadata.version("bitsandbytes") and device.type == "cuda":
            kinds.append("paged_adamw8bit")
        for kind in kinds:
            parameter = torch.nn.Parameter(torch.ones(64, 128, device=device))
            optimizer = optimizers.build(kind, {"weight": parameter}, learning_rate=1e-2)
            parameter.square().mean().backward()
            optimizer.step()
            if not bool((parameter.isfinite() & (parameter < 1)).all()):
                return Finding("devices", name, "warning", f"a step of {kind} on {device.type} went wrong", advice)
    except metadata.PackageNotFoundError:
        return Finding("devices", name, "ok", "bitsandbytes is not installed", 'pip install "lora-dpo[bitsandbytes]"')
    except Exception as error:
        return Finding("devices", name, "warning", f"no step on {device.type}: {_line(error)}", advice)
    return Finding("devices", name, "ok", f"a step of {', '.join(kinds)} works on {device.type}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip().isdigit():  # of this container
        total = min(total, int(limit.read_text()))
        free = min(free, total - int(used.read_text()))
    figures = {"free_gib": round(free / GIB, 2), "total_gib": round(total / GIB, 2)}
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Finding("machine", "memory", "warning", value, "the tiny world takes 1.5 GiB; close something", figures)
    advice = "" if free > 8 * GIB else "enough for the tiny world; loading SDXL takes about 8 GiB"
    return Finding("machine", "memory", "ok", value, advice, figures)


def _disks(places: dict[str, Path]) -> Iterator[Finding]:
    from huggingface_hub import constants

    for name, place in (places | {"hub cache": Path(constants.HF_HUB_CACHE)}).items():
        there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        usage = shutil.disk_usage(there)
        figures = {"free_gib": round(usage.free / GIB, 2), "total_gib": round(usage.total / GIB, 2), "path": str(place)}
        value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {place}"
        elsewhere = {
            "runs": "give another --run-dir",
            "cache": "set LORA_DPO_CACHE or output.cache_dir to another folder",
            "hub cache": "set HF_HOME to another folder",
        }[name]
        needed: Status = "warning" if name == "hub cache" else "problem"
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"x")
                file.flush()
                answer = run_lock.try_lock(file)
        except OSError as error:
            # In a file's place no folder can be made, whoever asks.
            reason = "a file is in its way" if not there.is_dir() else error.strerror or str(error)
            yield Finding("machine", name, needed, f"can't be written: {reason}: {place}", elsewhere, figures)
            continue
        if usage.free < GIB // 4:
            yield Finding("machine", name, needed, value, f"free some space, or {elsewhere}", figures)
        elif usage.free < 10 * GIB:
            advice = f"enough for the tiny world; real models and caches take tens of GiB: {elsewhere}"
            yield Finding("machine", name, "warning", value, advice, figures)
        elif name == "runs" and answer is run_lock.Answer.UNSUPPORTED:
            advice = "this file system has no locks: start only one process per run directory"
            yield Finding("machine", name, "warning", value, advice, figures)
        else:
            yield Finding("machine", name, "ok", value, "", figures)


def _hub() -> Iterator[Finding]:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to download base models"
        yield Finding("hub", "network", "ok", "offline, as HF_HUB_OFFLINE asks", advice)
    else:
        reason = _unreachable(constants.ENDPOINT)
        advice = "base models must be local folders or in the hub's cache" if reason else ""
        value = f"{constants.ENDPOINT} {f'is not reachable: {reason}' if reason else 'answers'}"
        yield Finding("hub", "network", "warning" if reason else "ok", value, advice)
    present = huggingface_hub.get_token() is not None
    advice = "" if present else "hf auth login, for gated models and for --push-to-hub"
    yield Finding("hub", "token", "ok", "present" if present else "none", advice)


def _unreachable(endpoint: str, seconds: float = 4.0) -> str:
    """Why; empty if it answers, with whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return _line(getattr(error, "reason", error))


def _tiny_world() -> Finding:
    changed = tinyworld.changed_files()
    if changed:
        value = f"missing or changed: {', '.join(changed[:3])}" + (" …" if len(changed) > 3 else "")
        return Finding("package", "tiny world", "problem", value, "install lora-dpo again")
    return Finding("package", "tiny world", "ok", "model and preferences are as released")


def _declared_ranges() -> dict[str, str]:
    """Package → the range that this package asks for; nothing if it runs without being installed."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in metadata.requires("lora-dpo") or []]
    except metadata.PackageNotFoundError:
        return {}
    return {each.name: str(each.specifier) for each in asked if str(each.specifier)}


def _within(version: str, declared: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(declared).contains(version, prereleases=True)


def _import_error(module: str, name: str) -> str:
    try:
        getattr(import_module(module), name)
    except Exception as error:  # import errors of all kinds, shared libraries' included
        return _line(error)
    return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _line(error: object) -> str:
    """The first line of what it says."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
