"""The moments of pictures: one store per size, so that the rows of a shard have one shape.

A picture is found by its bytes and by how it was framed. The same picture in two pairs of different buckets is stored
twice; in square pictures and in a bucket that happens to be that square, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_dpo.buckets import Size
from lora_dpo.cache_store import Damaged, Store, digest
from lora_dpo.data.framing import Framing

Key = tuple[str, Size]  # a digest of the picture's bytes, and the size that it is stored at


class PictureStores:
    """The shards of all sizes that a framing has.

    Args:
        directory: the cache's.
        made_by: the cache's version and the VAE's fingerprint.
        about: see `Store`.
    """

    def __init__(self, directory: Path, framing: Framing, made_by: tuple[object, ...], about: dict[str, Any]) -> None:
        self._of = {
            size: Store(directory / name, about | {"size": list(size), "crop": framing.crop})
            for size, name in moments_folders(framing, made_by).items()
        }

    def __getitem__(self, size: Size) -> Store:
        return self._of[size]

    def __contains__(self, key: Key) -> bool:
        name, size = key
        return name in self._of[size]

    def knows(self, name: str) -> bool:
        """Whether the picture is there at any size."""
        return any(name in store for store in self._of.values())

    def place(self, key: Key) -> tuple[str, int]:
        """A shard's path below the cache's directory, and the row; KeyError for a key that was never flushed."""
        name, size = key
        return below(self._of[size], name)

    @property
    def damaged(self) -> list[Damaged]:
        return [damage for store in self._of.values() for damage in store.damaged]

    def refresh(self) -> None:
        """Takes in what other processes have written since."""
        for store in self._of.values():
            store.refresh()

    def flush(self, sizes: Iterable[Size]) -> None:
        """Writes what was collected, one shard per size."""
        for size in sizes:
            self._of[size].flush()


def moments_folders(framing: Framing, made_by: tuple[object, ...]) -> dict[Size, str]:
    """The folder of each size, below the cache's directory; `made_by` as in `PictureStores`."""
    return {size: f"moments-{digest(*made_by, *_plan(framing, size))}" for size in framing.sizes}


def below(store: Store, key: str) -> tuple[str, int]:
    """The place of a row, as seen from the cache's directory."""
    name, row = store.place(key)
    return f"{store.directory.name}/{name}", row


def _plan(framing: Framing, size: Size) -> tuple[object, ...]:
    height, width = size
    square = height == width and framing.crop == "center"
    return (height,) if square else (height, width, framing.crop)
