"""Every random number is a pure function of (seed, purpose, indices).

Two calls with the same arguments give the same generator, in any order, process or session; different purposes
or indices give unrelated streams. Python's `hash` is salted per process, so a digest is used.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def seed_of(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit seed for one purpose and one place in it, e.g. `seed_of(7, "timestep", pair_key, visit)`."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(i).__name__}:{i}" for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """A fresh CPU generator; noise is drawn on the CPU so that it does not depend on the device."""
    import torch

    return torch.Generator().manual_seed(seed_of(seed, purpose, *indices))


def numpy_generator(seed: int, purpose: str, *indices: int | str) -> np.random.Generator:
    """A fresh numpy generator for the same key."""
    import numpy as np

    return np.random.default_rng(seed_of(seed, purpose, *indices))
