"""What lies in a cache directory: counted, checked, and deleted where nobody needs it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo import cache_index, cache_use
from lora_dpo.atomic import PARTIAL
from lora_dpo.cache_store import ABOUT, SUFFIX, Damaged, Shard, read_about

GROUP = re.compile(r"(moments|prompts)-[0-9a-f]{32}")
PAIRS = re.compile(r"pairs-[0-9a-f]{32}")
REFERENCES = re.compile(r"references-[0-9a-f]{32}")
LOCKS = re.compile(r"locks-[0-9a-f]{32}")
READERS = min(8, os.cpu_count() or 1)
Progress = Callable[[int, int | None, str], None]


@dataclass
class Group:
    """The shards that one network made in one way.

    Attributes:
        name: of the folder.
        about: what made the rows, as the fill wrote it; empty where that can't be read.
        sizes: bytes of each shard, by its path below the cache's directory.
        rows: of each shard; None for one that can't be opened.
        used: rows that the recipe in question uses.
        last_use: of the pairs that are made of it, in seconds since the epoch.
        in_use: a process fills it or reads from it now.
    """

    name: str
    about: dict[str, Any]
    sizes: dict[str, int]
    rows: dict[str, int | None]
    used: int = 0
    last_use: float | None = None
    in_use: bool = False


@dataclass(frozen=True)
class Pairs:
    """An index, or the lock of a fill that didn't get to write one.

    Attributes:
        path: of the index.
        about: the data, as the fill called it.
        groups: of the shards that it refers to, or that its fill may write; None: that can't be told.
        index: None where there is none that this version can read.
        own: it belongs to the recipe in question.
        last_use: in seconds since the epoch.
        in_use: a process fills it or reads from it now.
    """

    path: Path
    about: str
    groups: set[str] | None
    index: cache_index.Index | None
    own: bool
    last_use: float | None
    in_use: bool


@dataclass(frozen=True)
class References:
    """Errors of one reference at the draws of one set of pairs; see `reference_cache`.

    Attributes:
        about: all that the errors depend on; `about["pairs"]` is the pairs' fingerprint.
        sizes: bytes on the disk of each visit's file, by its path below the cache's directory.
    """

    name: str
    about: dict[str, Any]
    sizes: dict[str, int]


@dataclass(frozen=True)
class Survey:
    """A cache directory at one moment.

    Attributes:
        left_over: parts and locks of processes that ended, with their bytes.
    """

    directory: Path
    groups: list[Group]
    pairs: list[Pairs]
    references: list[References]
    left_over: dict[Path, int]


@dataclass(frozen=True)
class Pruning:
    """What may go, and what stays though no index refers to it.

    Attributes:
        files: path → (bytes, reason).
        kept_bytes: of the shards that fills, going on or unfinished, may want.
    """

    files: dict[Path, tuple[int, str]]
    kept_bytes: int

    def reasons(self) -> dict[str, tuple[int, int]]:
        """(files, bytes) by reason."""
        found: dict[str, tuple[int, int]] = {}
        for size, reason in self.files.values():
            files, total = found.get(reason, (0, 0))
            found[reason] = (files + 1, total + size)
        return found


def survey(directory: Path, own: Sequence[Path], progress: Progress | None = None) -> Survey:
    """Looks at every file, and into every shard's header.

    Args:
        own: the indexes of the recipe in question, present or not.
    """
    pairs = [_pairs(path, own) for path in _indexes(directory)]
    folders = [path for path in _listed(directory) if GROUP.fullmatch(path.name) and path.is_dir()]
    shards = {folder: sorted(folder.glob(f"*{SUFFIX}")) for folder in folders}
    used = cache_index.used_rows([found.index for found in pairs if found.own and found.index])
    total, done, groups = sum(map(len, shards.values())), 0, []
    for folder, paths in shards.items():
        group = Group(folder.name, read_about(folder), {}, {})
        for path in paths:
            name, done = f"{folder.name}/{path.name}", done + 1
            with contextlib.suppress(FileNotFoundError):
                group.sizes[name] = path.stat().st_size
                group.rows[name] = _rows(path)
                group.used += used[name]
            if progress is not None:
                progress(done, total, "reading headers")
        users = [found for found in pairs if found.groups is not None and group.name in found.groups]
        group.last_use = max((found.last_use for found in users if found.last_use is not None), default=None)
        group.in_use = any(found.in_use for found in users)
        groups.append(group)
    references = [
        References(
            folder.name,
            read_about(folder),
            {f"{folder.name}/{path.name}": _on_disk(path) for path in sorted(folder.glob("visit-*.bin"))},
        )
        for folder in _listed(directory)
        if REFERENCES.fullmatch(folder.name) and folder.is_dir()
    ]
    return Survey(directory, groups, pairs, references, dict(_left_over(directory, folders, pairs)))


def verify(directory: Path, shards: Sequence[str], progress: Progress | None = None) -> list[Damaged]:
    """Reads every row of these shards against its checksum; one that is missing counts as damaged.

    Args:
        shards: paths below the directory.
        progress: counts shards.
    """

    def check(name: str) -> Damaged | None:
        try:
            shard = Shard(directory / name)
            try:
                shard.verify()
            finally:
                shard.close()
        except Damaged as error:
            return error
        return None

    found = []
    with ThreadPoolExecutor(READERS, "verify") as pool:
        try:
            for done, damage in enumerate(pool.map(check, shards), start=1):
                if damage is not None:
                    found.append(damage)
                if progress is not None:
                    progress(done, len(shards), "verifying")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def to_prune(found: Survey, stays: Callable[[Pairs], bool] = lambda _: True) -> Pruning:
    """What nobody needs: rests of processes that ended, shards that no pairs are made of, errors of no pairs.

    What a process is using stays, and the recipe's own pairs, and the others that are to stay. Pairs whose index is
    unfinished, damaged or another version's may be made of any shard of their groups.

    Args:
        stays: whether pairs of other recipes are to be kept, with their shards.
    """
    files = {path: (size, "rests of processes that ended") for path, size in found.left_over.items()}
    kept = [pairs for pairs in found.pairs if pairs.in_use or pairs.own or stays(pairs)]
    for pairs in found.pairs:
        if pairs not in kept:
            for path in (pairs.path, cache_use.lock_of(pairs.path)):
                with contextlib.suppress(FileNotFoundError):
                    files[path] = (path.stat().st_size, "other pairs")
    needed = {shard for pairs in kept if pairs.index for shard in pairs.index.shards}
    claims = [pairs.groups for pairs in kept if pairs.index is None or pairs.in_use]
    kept_bytes = 0
    for group in found.groups:
        claimed = any(claim is None or group.name in claim for claim in claims)
        for shard, size in group.sizes.items():
            if shard not in needed and claimed:
                kept_bytes += size
            elif shard not in needed:
                files[found.directory / shard] = (size, "shards that no pairs are made of")
    known = {pairs.index.fingerprint for pairs in kept if pairs.index}
    if all(pairs.index for pairs in kept):
        for references in found.references:
            if references.about.get("pairs") not in known:
                reason = "reference errors of pairs that are gone"
                files |= {found.directory / name: (size, reason) for name, size in references.sizes.items()}
    return Pruning(files, kept_bytes)


def delete(directory: Path, files: Mapping[Path, int], progress: Progress | None = None) -> tuple[int, list[Path]]:
    """Deletes files of the directory, indexes before shards, and the folders that are empty then.

    Args:
        files: path → bytes.

    Returns:
        bytes freed, and the files that couldn't be deleted.
    """
    freed, failed = 0, []
    order = sorted(files, key=lambda path: (path.parent != directory, path))
    for done, path in enumerate(order, start=1):
        try:
            path.unlink()
            freed += files[path]
        except FileNotFoundError:
            pass
        except OSError:
            failed.append(path)
        if progress is not None:
            progress(done, len(order), "deleting")
    for folder in sorted({path.parent for path in order} - {directory}):
        with contextlib.suppress(OSError):
            if all(path.name == ABOUT for path in folder.iterdir()):
                (folder / ABOUT).unlink(missing_ok=True)
                folder.rmdir()
    return freed, failed


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _indexes(directory: Path) -> list[Path]:
    """Of finished fills and of unfinished ones."""
    found = {path.with_suffix(SUFFIX) for path in _listed(directory) if path.suffix in (SUFFIX, ".lock")}
    return sorted(path for path in found if PAIRS.fullmatch(path.stem))


def _pairs(path: Path, own: Sequence[Path]) -> Pairs:
    index, note = cache_index.read(path), cache_use.note(path)
    groups = set(note.groups) if note is not None else None
    if index is not None:
        groups = (groups or set()) | {name.partition("/")[0] for name in index.shards}
    about = note.about if note is not None else ""
    return Pairs(path, about, groups, index, path in own, cache_use.last_use(path), cache_use.in_use(path))


def _on_disk(path: Path) -> int:
    """Bytes that a file with holes takes up, where the system tells."""
    found = path.stat()
    return min(found.st_size, getattr(found, "st_blocks", found.st_size) * 512)


def _rows(path: Path) -> int | None:
    try:
        shard = Shard(path)
    except Damaged:
        return None
    rows = len(shard)
    shard.close()
    return rows


def _left_over(directory: Path, folders: Sequence[Path], pairs: Sequence[Pairs]) -> Iterator[tuple[Path, int]]:
    """Parts of files, and chunks' locks, that no living process can be at work with."""
    busy = [found for found in pairs if found.in_use]
    ids = {found.path.stem.removeprefix("pairs-") for found in busy}
    for folder in _listed(directory):
        if LOCKS.fullmatch(folder.name) and folder.is_dir() and folder.name.removeprefix("locks-") not in ids:
            yield from ((lock, lock.stat().st_size) for lock in _listed(folder))
    for folder in (directory, *folders):
        used = busy if folder == directory else [f for f in busy if f.groups is None or folder.name in f.groups]
        for path in _listed(folder) if not used else []:
            if path.name.startswith(".") and path.name.endswith(PARTIAL):
                yield path, path.stat().st_size
