"""The most memory in use, since the program or a part of it began."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def restart(device: torch.device) -> None:
    """`gib` counts from now on; on macOS and Windows, and where Linux forbids it, it goes on counting as before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
        except OSError:
            return


def gib(device: torch.device) -> float:
    """GiB: what torch had allocated on a GPU at most, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    if sys.platform == "linux" and (kib := _high_water_kib()) is not None:
        return kib / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _high_water_kib() -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
