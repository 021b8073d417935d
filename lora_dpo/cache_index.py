"""Which rows of which shards make up each pair: one memory-mapped file per source, its size in memory constant.

Beside the pairs' digests and places it holds prompts and origins as one run of text each, with the ends of its entries.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_dpo import atomic
from lora_dpo.buckets import Size
from lora_dpo.cache_store import HINT
from lora_dpo.data import SourceReport

Place = tuple[str, int]  # a shard's path below the cache's directory, and a row of it
FORMAT = "2"


@dataclass
class Draft:
    """The pairs of a source, as a fill finds them.

    Attributes:
        keys: a digest per pair.
        winners, losers: keys of images.
        sizes: that a pair's pictures are stored at.
        labels: the probability that a pair's winner is the better one.
        prompt_of: places in `prompts`.
    """

    keys: list[str] = field(default_factory=list)
    winners: list[str] = field(default_factory=list)
    losers: list[str] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    prompt_of: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)


class Texts(Sequence[str]):
    """Many strings in one array of bytes; read one at a time."""

    def __init__(self, run: np.ndarray, ends: np.ndarray) -> None:
        self._run, self._ends = run, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._run[start : int(self._ends[index])].tobytes().decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Digests(Texts):
    """Strings of 32 hex digits, 16 bytes each."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [row.tobytes().hex() for row in self._rows[index]]
        return self._rows[index].tobytes().hex()


class Index:
    """An index file, opened.

    Attributes:
        report: of the source when the index was made.
        fingerprint: of the pairs, their order, and what made their rows.
        shards: paths below the cache's directory.
        keys, origins: of the pairs.
        prompts: the distinct ones.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError, OSError or SafetensorError where the file is not what was written."""
        _require_sound(path)
        with safe_open(path, "pt") as file:
            # Views of the memory map, which lives as long as they do.
            held = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["index"])
        counts = {name: Counter(about["report"][name]) for name in ("dropped", "elsewhere")}
        self.report = SourceReport(**about["report"] | counts)
        self.fingerprint: str = about["fingerprint"]
        self.shards: list[str] = about["shards"]
        self._sizes: list[Size] = [(size[0], size[1]) for size in about["sizes"]]
        self.keys: Sequence[str] = Digests(held["keys"])
        self.prompts: Sequence[str] = Texts(held["prompts"], held["prompt_ends"])
        self.origins: Sequence[str] = Texts(held["origins"], held["origin_ends"])
        self._images, self._prompt_of, self._size_of = held["images"], held["prompt_of"], held["size_of"]
        self._texts, self._labels = held["texts"], held.get("labels")

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(shard, row) of the winner and of the loser."""
        a, b, c, d = self._images[index].tolist()
        return (a, b), (c, d)

    def label(self, index: int) -> float:
        """The probability that the winner is the better one."""
        return 1.0 if self._labels is None else float(self._labels[index])

    def prompt(self, index: int) -> int:
        return int(self._prompt_of[index])

    def text(self, prompt: int) -> tuple[int, int]:
        """(shard, row) of a prompt; -1 is the empty one."""
        shard, row = self._texts[prompt].tolist()
        return shard, row

    def places(self) -> np.ndarray:
        """(shard, row) of every picture and prompt, int64 [n, 2], in memory."""
        return np.concatenate([self._images.reshape(-1, 2), self._texts]).astype(np.int64)

    def size(self, index: int) -> Size:
        """Of the pair's pictures."""
        return self._sizes[int(self._size_of[index])]

    def sizes(self) -> Counter[Size]:
        """How many pairs there are of each size."""
        counts = np.bincount(self._size_of, minlength=len(self._sizes)).tolist()
        return Counter(dict(zip(self._sizes, counts, strict=True)))


def write(
    path: Path,
    draft: Draft,
    report: SourceReport,
    fingerprint: str,
    images: Callable[[tuple[str, Size]], Place],
    texts: Sequence[Place],
) -> None:
    """Writes the file, complete or not at all.

    Args:
        images: the place of a picture at a size.
        texts: the places of the draft's prompts, then the empty prompt's.
    """
    number: dict[str, int] = {}
    sizes: dict[Size, int] = {}

    def place(found: Place) -> tuple[int, int]:
        return number.setdefault(found[0], len(number)), found[1]

    pairs = zip(draft.winners, draft.losers, draft.sizes, strict=True)
    rows = [(*place(images((winner, size))), *place(images((loser, size)))) for winner, loser, size in pairs]
    size_of = [sizes.setdefault(size, len(sizes)) for size in draft.sizes]
    prompts, prompt_ends = _run(draft.prompts)
    origins, origin_ends = _run(draft.origins)
    tensors = {
        "keys": np.frombuffer(bytes.fromhex("".join(draft.keys)), np.uint8).reshape(-1, 16),
        "images": np.array(rows, np.int32),
        "prompt_of": np.array(draft.prompt_of, np.int32),
        "size_of": np.array(size_of, np.int16),
        "texts": np.array([place(found) for found in texts], np.int32),
        "prompts": prompts,
        "prompt_ends": prompt_ends,
        "origins": origins,
        "origin_ends": origin_ends,
    }
    if any(label != 1 for label in draft.labels):
        tensors["labels"] = np.array(draft.labels, np.float32)
    about = json.dumps(
        {"report": vars(report), "fingerprint": fingerprint, "shards": list(number), "sizes": list(sizes)}
    )
    data = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    body = save(data, {})
    check = zlib.crc32(body[8 + int.from_bytes(body[:8], "little") :], zlib.crc32((about + _schema(data)).encode()))
    with atomic.clear_os_errors(path.parent, HINT):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = save(data, {"index": about, "format": FORMAT, "check": str(check)})
        atomic.replace(path, whole, shared=True)


def read(path: Path) -> Index | None:
    """None where there is none, or a damaged one: it is then made anew from the source and the shards."""
    try:
        return Index(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def used_rows(indexes: Sequence[Index]) -> Counter[str]:
    """How many rows of each shard the pairs of these indexes are made of."""
    number: dict[str, int] = {}
    found = [np.empty(0, np.int64)]
    for index in indexes:
        shards = np.array([number.setdefault(name, len(number)) for name in index.shards], np.int64)
        places = index.places()
        found.append((shards[places[:, 0]] << 32) | places[:, 1])
    counts = np.bincount(np.unique(np.concatenate(found)) >> 32, minlength=len(number))
    return Counter(dict(zip(number, counts.tolist(), strict=True)))


def is_foreign(path: Path) -> bool:
    """Whether the file is an index of another version's format."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["format"] != FORMAT
    except (OSError, SafetensorError, KeyError, TypeError):
        return False


def _require_sound(path: Path) -> None:
    """Checks the checksum; the file is read in pieces, so that nothing stays in memory."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        about, expected = metadata["index"], int(metadata["check"])
        check = zlib.crc32((about + _schema({name: file.get_tensor(name) for name in file.keys()})).encode())  # noqa: SIM118
    if metadata["format"] != FORMAT:
        raise ValueError("another format")
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 20):
            check = zlib.crc32(piece, check)
    if check != expected:
        raise ValueError("the checksum is wrong")


def _schema(tensors: Mapping[str, torch.Tensor]) -> str:
    return "".join(f"{name}{tensors[name].dtype}{list(tensors[name].shape)}" for name in sorted(tensors))


def _run(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.array(bytearray().join(encoded), np.uint8), ends
