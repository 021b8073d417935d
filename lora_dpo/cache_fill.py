"""Encoding what is missing, by any number of processes at once.

The distinct pictures of a source, in the order in which they come first, are divided into chunks of one shard each.
A process that meets a missing picture tries to lock the picture's chunk, and leaves the chunk to the lock's holder
where that fails. The division and the batches follow from the source alone, so that the same rows come out whoever
makes them, after however many kills. Locks only spare work: a shard appears complete, under a name that tells its
content.
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
from lora_dpo.cache_index import Draft
from lora_dpo.cache_store import HINT, Store, digest
from lora_dpo.data import Preference, PreferenceSource, SourceReport
from lora_dpo.data.images import centre_square, decode, to_pixels
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Family, NotFiniteError, geometry

PROMPTS_PER_BATCH = 64
EMPTY = ""
# A lock that outlives its process, as on some network file systems, costs so much waiting and no more.
PATIENCE_SECONDS = 600.0
Progress = Callable[[int, int | None, str], None]


@dataclass
class Work:
    """What a fill is made of.

    Attributes:
        batch: images that are encoded together.
        images_per_shard: a multiple of `batch`; also the images of a chunk.
        locks: the folder of this source's lock files.
        tell: one line for the user.
        encoded: counts the "pictures" and "prompts" that this process encodes.
    """

    family: Family
    images: Store
    texts: Store
    resolution: int
    batch: int
    images_per_shard: int
    locks: Path
    progress: Progress | None
    tell: Callable[[str], None]
    encoded: Counter[str]
    use_locks: bool = True
    shown: int = field(default=0, init=False)

    def count(self, done: int) -> None:
        if self.progress is not None and done > self.shown:
            self.shown = done
            self.progress(done, None, "encoding images")


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
    """The pictures of one shard, encoded in batches as they come."""

    def __init__(self, work: Work, number: int) -> None:
        self._work, self.number = work, number
        self._lock = FileLock(work.locks / f"{number}.lock")
        self._waiting: dict[str, tuple[Tensor, Tensor, str]] = {}
        self._mine: bool | None = None
        self.encoded = False

    def mine(self) -> bool:
        """Whether this process is the one to encode what is missing here; asked when something is."""
        if self._mine is None:
            self._mine = not self._work.use_locks or _try(self._lock, self._work)
            if self._mine:
                self._work.images.refresh()
        return self._mine

    def add(self, name: str, data: bytes, picture: Image | None, origin: str) -> None:
        picture = picture or decode(data, origin)
        resolution = self._work.resolution
        square, crop = centre_square(picture, resolution)
        size = geometry((picture.height, picture.width), crop, (resolution, resolution))
        self._waiting[name] = (to_pixels(square), size, origin)
        if len(self._waiting) == self._work.batch:
            self._encode()

    def close(self) -> None:
        """Encodes and writes what is left."""
        if self._waiting:
            self._encode()
        self._work.images.flush()
        self.release()

    def release(self) -> None:
        self._lock.release()

    def _encode(self) -> None:
        pixels = torch.stack([pixels for pixels, _, _ in self._waiting.values()])
        try:
            moments = self._work.family.encode_images(pixels)
        except NotFiniteError as error:
            origins = [origin for _, _, origin in self._waiting.values()]
            bad = ", ".join(dict.fromkeys(origins[index] for index in error.images))
            raise UserError("the VAE's moments have NaN or infinite values for a picture", bad, error.hint) from error
        sizes = torch.cat([size for _, size, _ in self._waiting.values()])
        self._work.images.add(list(self._waiting), {"mean": moments.mean, "std": moments.std, "geometry": sizes})
        self._work.encoded["pictures"] += len(self._waiting)
        self._waiting.clear()
        self.encoded = True


def _pass(source: PreferenceSource, work: Work) -> tuple[Draft, SourceReport, list[int]]:
    """Once through the source; also the chunks that other processes are making."""
    draft, images = Draft(), work.images
    prompt_of: dict[str, int] = {}
    first_seen: dict[str, int] = {}
    seen: set[str] = set()
    duplicates: list[str] = []
    left: dict[int, None] = {}
    chunk, encoded = _Chunk(work, 0), False
    with _known_pictures(source, images):
        try:
            for preference in source:
                names = []
                for name, data, picture in _sides(preference):
                    names.append(name)
                    if name in first_seen:
                        continue
                    number = first_seen[name] = len(first_seen)
                    if number // work.images_per_shard != chunk.number:
                        chunk.close()
                        encoded = encoded or chunk.encoded
                        chunk = _Chunk(work, number // work.images_per_shard)
                    if name in images:
                        continue
                    if not chunk.mine():
                        left[chunk.number] = None
                    elif name not in images:
                        chunk.add(name, data, picture, preference.origin)
                key = digest(preference.prompt, *names)
                if key in seen:
                    duplicates.append(preference.origin)
                    continue
                seen.add(key)
                draft.keys.append(key)
                draft.winners.append(names[0])
                draft.losers.append(names[1])
                draft.sizes.append((work.resolution, work.resolution))
                draft.origins.append(preference.origin)
                draft.prompt_of.append(prompt_of.setdefault(preference.prompt, len(prompt_of)))
                work.count(len(draft.keys))
            chunk.close()
        finally:
            chunk.release()
    if encoded or chunk.encoded:
        work.family.release_encoders()
    if not draft.keys:
        raise UserError("the source has no usable pair", hint=source.report.summary())
    draft.prompts.extend(prompt_of)
    report = copy.deepcopy(source.report)
    for origin in duplicates:
        report.kept -= 1
        report.drop("duplicate pair", origin)
    return draft, report, list(left)


def _sides(preference: Preference) -> Iterator[tuple[str, bytes, Image | None]]:
    for data, picture in zip((preference.winner, preference.loser), preference.pictures, strict=True):
        yield digest(data), data, picture


@contextmanager
def _known_pictures(source: PreferenceSource, images: Store) -> Iterator[None]:
    """Scope in which the source decodes no picture that was encoded before."""
    source.known = lambda data: digest(data) in images
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
