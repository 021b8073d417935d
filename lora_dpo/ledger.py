"""What is alive on a device while code runs, by part and by phase, and where that is most.

A ledger stands where operations reach their kernels, and counts each storage from the operation that returns it until
nothing holds it any more: views share one, and what a graph saves for its backward pass is held by the graph. It does
so for real tensors and for fake ones alike. What a kernel takes and gives back within one operation it can't see.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, REFERENCE = "activations", "reference"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, REFERENCE)
# In no part: memory of another kind.
ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive; `parts` add up to `total`, all in bytes."""

    total: int
    parts: dict[str, int]


def places_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a module and those in it keep tensors, as (a dictionary, a key of it, the tensor).

    Besides weights and buffers these are the tensors in objects of other kinds, as quantised layers have them.
    """
    for owner in module.modules():
        for kept in (owner._parameters, owner._buffers):
            yield from ((kept, name, tensor) for name, tensor in kept.items() if tensor is not None)
        for value in list(vars(owner).values()):
            yield from _places_in(value)


def _places_in(value: Any) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    if isinstance(value, nn.Module | Tensor | type) or not type(value).__module__.startswith("bitsandbytes"):
        return
    for name, inner in list(vars(value).items()):
        if isinstance(inner, Tensor):
            yield vars(value), name, inner
        else:
            yield from _places_in(inner)


class Ledger(TorchDispatchMode):
    """A scope whose operations' results are counted.

    Args:
        block: every storage counts as a multiple of so many bytes.
        device: count this type of device alone, such as "cuda"; None: everything.

    Attributes:
        phase: asked with each new storage, the name of what is going on; None: nothing that has a peak.
        peaks: by phase, in their order; all that was alive then, whichever phase it is from.
    """

    def __init__(self, *, block: int = 1, device: str | None = None) -> None:
        super().__init__()
        self.peaks: dict[str, Peak] = {}
        self.phase: Callable[[], str | None] = lambda: None
        self._block, self._device = block, device
        self._part: str | None = None
        self._alive: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}

    @property
    def alive(self) -> Peak:
        """What is alive now."""
        parts = {part: size for part, size in self._alive.items() if size}
        return Peak(sum(parts.values()), parts)

    @contextmanager
    def during(self, phase: str | Callable[[], str], part: str | None = None) -> Iterator[None]:
        """Scope of one phase, or of those that a function tells.

        Args:
            part: of what is made in here; None: `REFERENCE` in the phase of that name, else `ACTIVATIONS`.
        """
        before = self.phase, self._part
        self.phase, self._part = phase if callable(phase) else lambda: phase, part
        self._note(self.phase())
        try:
            yield
        finally:
            self.phase, self._part = before

    def count(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """These belong to this part from now on, whether or not they were counted before."""
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor, part)

    def count_module(self, part: str, module: nn.Module) -> None:
        """All tensors that the module keeps."""
        self.count(part, [tensor for _, _, tensor in places_of(module)])

    # Nothing in here is to be compiled; torch's wrapper that says so costs more than what it wraps.
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor, part: str | None = None) -> None:
        if tensor.layout is not torch.strided or (self._device is not None and tensor.device.type != self._device):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is None:
            phase = self.phase()
            size = -(-storage.nbytes() // self._block) * self._block
            held = weakref.ref(storage, lambda _: self._forget(key))
            part = part or self._part or (REFERENCE if phase == REFERENCE else ACTIVATIONS)
            known = self._storages[key] = _Storage(held, size, part)
            self._add(known, size)
            self._note(phase)
        elif part is not None:
            self._add(known, -known.size)
            known.part = part
            self._add(known, known.size)

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key)
        self._add(gone, -gone.size)

    def _add(self, storage: _Storage, size: int) -> None:
        if storage.part != ELSEWHERE:
            self._alive[storage.part] += size

    def _note(self, phase: str | None) -> None:
        if phase is None:
            return
        highest = self.peaks.get(phase)
        if highest is None or self._alive.total() > highest.total:
            self.peaks[phase] = self.alive


@dataclass(slots=True)
class _Storage:
    held: weakref.ref[Any]
    size: int
    part: str
