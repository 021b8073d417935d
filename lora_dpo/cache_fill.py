"""Encoding what is missing, by any number of processes at once.

The distinct pictures of a source, in the order in which they come first, are divided into chunks, which become one
shard for each size in them. A process that meets a missing picture tries to lock the picture's chunk, and leaves the
chunk to the lock's holder where that fails. The division and the batches follow from the source alone, so that the same
rows come out whoever makes them, after however many kills. Locks only spare work: a shard appears complete, under a
name that tells its content.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL.Image import Image
from torch import Tensor

from lora_dpo.atomic import clear_os_errors
from lora_dpo.buckets import Size, written
from lora_dpo.cache_index import Draft
from lora_dpo.cache_pictures import Key, PictureStores
from lora_dpo.cache_store import HINT, Store, digest
from lora_dpo.data import Preference, PreferenceSource, SourceReport
from lora_dpo.data.framing import TOO_SMALL, Framing, frame
from lora_dpo.data.images import decode, to_pixels, upright_size
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Family, NotFiniteError, geometry

PROMPTS_PER_BATCH = 64
EMPTY = ""
DUPLICATE = "duplicate pair"
# A lock that outlives its process, as on some network file systems, costs so much waiting and no more.
PATIENCE_SECONDS = 600.0
Progress = Callable[[int, int | None, str], None]


@dataclass
class Work:
    """What a fill is made of.

    Attributes:
        batch: images that are encoded together, all of one size.
        images_per_chunk: a multiple of `batch`.
        locks: the folder of this source's lock files.
        tell: one line for the user.
        encoded: counts the "pictures" and "prompts" that this process encodes.
    """

    family: Family
    images: PictureStores
    texts: Store
    framing: Framing
    batch: int
    images_per_chunk: int
    locks: Path
    progress: Progress | None
    tell: Callable[[str], None]
    encoded: Counter[str]
    use_locks: bool = True
    shown: int = field(default=-1, init=False)

    def count(self, done: int, total: int | None) -> None:
        """Rows of the source; a pass that is made again says nothing until it is further."""
        if self.progress is not None and done > self.shown:
            self.shown = done
            self.progress(done, total, "encoding images")


def encode_images(source: PreferenceSource, work: Work) -> tuple[Draft, SourceReport]:
    """Every pair of the source, after all of its pictures are in shards.

    Raises:
        UserError: no usable pair, or a directory that can't be written.
        LoraDpoError: moments that are not finite, naming the images' origins.
    """
    while True:
        draft, report, left = _pass(source, work)
        if not left:
            return draft, report
        work.use_locks = _wait(work, left)
        work.images.refresh()


def encode_prompts(prompts: Iterable[str], work: Work) -> None:
    """The prompts' conditioning, and the empty prompt's; LoraDpoError if it isn't finite."""
    texts, family = work.texts, work.family

    def missing() -> list[str]:
        return [prompt for prompt in dict.fromkeys([EMPTY, *prompts]) if digest(prompt) not in texts]

    if not missing():
        return
    with _patient_lock(work, "prompts"):
        texts.refresh()
        wanted = missing()
        if work.progress is not None:
            work.progress(0, len(wanted), "encoding prompts")
        for start in range(0, len(wanted), PROMPTS_PER_BATCH):
            part = wanted[start : start + PROMPTS_PER_BATCH]
            conditioning = family.encode_prompts(part)
            for name, tensor in conditioning.items():
                finite = tensor.isfinite().flatten(1).all(dim=1).tolist()
                if not all(finite):
                    prompt = part[finite.index(False)]
                    raise LoraDpoError(
                        f"the text encoder's {name} has NaN or infinite values for the prompt {prompt!r}"
                    )
            texts.add([digest(prompt) for prompt in part], conditioning)
            work.encoded["prompts"] += len(part)
            if work.progress is not None:
                work.progress(start + len(part), len(wanted), "encoding prompts")
        texts.flush()
    if wanted:
        family.release_encoders()


def finish(work: Work) -> None:
    """Removes the locks; who still holds one goes on undisturbed."""
    shutil.rmtree(work.locks, ignore_errors=True)


class _Chunk:
    """Some pictures in a row, encoded in batches of one size as they come."""

    def __init__(self, work: Work, number: int) -> None:
        self._work, self.number = work, number
        self._lock = FileLock(work.locks / f"{number}.lock")
        self._waiting: dict[Size, dict[str, tuple[Tensor, Tensor, str]]] = {}
        self._mine: bool | None = None
        self.encoded = False

    def mine(self) -> bool:
        """Whether this process is the one to encode what is missing here; asked when something is."""
        if self._mine is None:
            self._mine = not self._work.use_locks or _try(self._lock, self._work)
            if self._mine:
                self._work.images.refresh()
        return self._mine

    def add(self, key: Key, data: bytes, picture: Image | None, origin: str) -> None:
        picture, (name, size) = picture or decode(data, origin), key
        framed, crop = frame(picture, size, self._work.framing.crop)
        waiting = self._waiting.setdefault(size, {})
        waiting[name] = (to_pixels(framed), geometry((picture.height, picture.width), crop, size), origin)
        if len(waiting) == self._work.batch:
            self._encode(size)

    def close(self) -> None:
        """Encodes and writes what is left."""
        for size in self._waiting:
            self._encode(size)
        self._work.images.flush(self._waiting)
        self.release()

    def release(self) -> None:
        self._lock.release()

    def _encode(self, size: Size) -> None:
        waiting = self._waiting[size]
        if not waiting:
            return
        pixels = torch.stack([pixels for pixels, _, _ in waiting.values()])
        try:
            moments = self._work.family.encode_images(pixels)
        except NotFiniteError as error:
            origins = [origin for _, _, origin in waiting.values()]
            bad = ", ".join(dict.fromkeys(origins[index] for index in error.images))
            raise UserError("the VAE's moments have NaN or infinite values for a picture", bad, error.hint) from error
        geometries = torch.cat([geometry for _, geometry, _ in waiting.values()])
        rows = {"mean": moments.mean, "std": moments.std, "geometry": geometries}
        self._work.images[size].add(list(waiting), rows)
        self._work.encoded["pictures"] += len(waiting)
        waiting.clear()
        self.encoded = True


def _pass(source: PreferenceSource, work: Work) -> tuple[Draft, SourceReport, list[int]]:
    """Once through the source; also the chunks that other processes are making."""
    draft, images = Draft(), work.images
    prompt_of: dict[str, int] = {}
    first_seen: dict[Key, int] = {}
    seen: set[str] = set()
    dropped: list[tuple[str, str, str]] = []
    left: dict[int, None] = {}
    chunk, encoded = _Chunk(work, 0), False
    work.count(0, source.done()[1])
    with _known_pictures(source, images):
        try:
            for preference in source:
                read, rows = source.done()
                work.count(read - 1, rows)
                own = own_sizes(preference) if work.framing.looks else ()
                size = work.framing.size_for(own)
                if work.framing.drops(own, size):
                    dropped.append(
                        (TOO_SMALL, preference.origin, " and ".join(map(written, own)) + f" for {written(size)}")
                    )
                    continue
                names = []
                for name, data, picture in _sides(preference):
                    names.append(name)
                    key = (name, size)
                    if key in first_seen:
                        continue
                    number = first_seen[key] = len(first_seen)
                    if number // work.images_per_chunk != chunk.number:
                        chunk.close()
                        encoded = encoded or chunk.encoded
                        chunk = _Chunk(work, number // work.images_per_chunk)
                    if key in images:
                        continue
                    if not chunk.mine():
                        left[chunk.number] = None
                    elif key not in images:
                        chunk.add(key, data, picture, preference.origin)
                pair = digest(preference.prompt, *names, *([] if preference.label == 1 else [preference.label]))
                if pair in seen:
                    dropped.append((DUPLICATE, preference.origin, ""))
                    continue
                seen.add(pair)
                draft.keys.append(pair)
                draft.winners.append(names[0])
                draft.losers.append(names[1])
                draft.sizes.append(size)
                draft.labels.append(preference.label)
                draft.origins.append(preference.origin)
                draft.prompt_of.append(prompt_of.setdefault(preference.prompt, len(prompt_of)))
            chunk.close()
            work.count(*source.done())
        finally:
            chunk.release()
    if encoded or chunk.encoded:
        work.family.release_encoders()
    report = copy.deepcopy(source.report)
    for reason, origin, detail in dropped:
        report.kept -= 1
        report.drop(reason, origin, detail)
    report.ties = sum(label == 0.5 for label in draft.labels)
    if not draft.keys:
        raise UserError("the source has no usable pair", hint=report.summary())
    draft.prompts.extend(prompt_of)
    return draft, report, list(left)


def own_sizes(preference: Preference) -> tuple[Size, ...]:
    """Of the pair's pictures, upright."""
    sides = zip((preference.winner, preference.loser), preference.pictures, strict=True)
    return tuple(
        upright_size(data, preference.origin) if picture is None else (picture.height, picture.width)
        for data, picture in sides
    )


def _sides(preference: Preference) -> Iterator[tuple[str, bytes, Image | None]]:
    for data, picture in zip((preference.winner, preference.loser), preference.pictures, strict=True):
        yield digest(data), data, picture


@contextmanager
def _known_pictures(source: PreferenceSource, images: PictureStores) -> Iterator[None]:
    """Scope in which the source decodes no picture that was encoded before."""
    source.known = lambda data: images.knows(digest(data))
    try:
        yield
    finally:
        source.known = None


def _wait(work: Work, chunks: Sequence[int]) -> bool:
    """Until the other processes are done with these chunks; False when the patience for them has run out."""
    work.tell(f"another process is filling this cache: waiting for {len(chunks)} of its shards")
    until = time.monotonic() + PATIENCE_SECONDS
    for number in chunks:
        if not _try(FileLock(work.locks / f"{number}.lock"), work, max(0.0, until - time.monotonic()), keep=False):
            work.tell("the other process doesn't get on: its part is encoded here too")
            return False
    return True


@contextmanager
def _patient_lock(work: Work, name: str) -> Iterator[None]:
    """Scope of a lock, or of none after waiting in vain."""
    lock = FileLock(work.locks / f"{name}.lock")
    if work.use_locks and not _try(lock, work):
        work.tell(f"another process is filling this cache: waiting for its {name}")
        _try(lock, work, PATIENCE_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _try(lock: FileLock, work: Work, seconds: float = 0.0, *, keep: bool = True) -> bool:
    """Whether the lock was had within so many seconds; True too where the file system has no locks."""
    with clear_os_errors(work.locks, HINT):
        work.locks.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=seconds, poll_interval=0.1)
        except Timeout:
            return False
        except NotImplementedError:
            return True
    if not keep:
        lock.release()
    return True
