"""Pixels to VAE moments and prompts to embeddings, once each, stored by content and by what produced them.

```text
directory/moments-<VAE, size, crop>/<digest of keys>.safetensors    mean, std, geometry of many images
directory/prompts-<text encoders>/<digest of keys>.safetensors      the conditioning of many prompts
directory/pairs-<source, VAE, framing, text encoders>.safetensors    which of them make up each pair
```
A shard is complete or absent, so a fill that was killed goes on from the shards it finished. One network is loaded at a
time: the VAE while images are encoded, the text encoders while prompts are, and none once `fill` returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lora_dpo import cache_fill, cache_index, cache_use
from lora_dpo.buckets import Size
from lora_dpo.cache_fill import EMPTY, Progress, Work
from lora_dpo.cache_index import Index
from lora_dpo.cache_pictures import PictureStores, below, moments_folders
from lora_dpo.cache_store import Damaged, Reader, Shard, Store, digest, discard
from lora_dpo.data import PreferenceSource
from lora_dpo.data.framing import Framing
from lora_dpo.errors import LoraDpoError
from lora_dpo.families import Conditioning, Family, Moments

VERSION = 2
ATTEMPTS = 3


@dataclass(frozen=True)
class CachedPair:
    """One pair as batches of one, ready to be concatenated with others of its size.

    `prompt` indexes `CachedPairs.prompts`; `label` is the probability that the winner is the better one.
    """

    winner: Moments
    loser: Moments
    winner_geometry: Int[Tensor, "1 6"]
    loser_geometry: Int[Tensor, "1 6"]
    prompt: int
    label: float = 1.0


class CachedPairs:
    """The pairs of one source, read from memory-mapped files one at a time, each row against its checksum.

    A row that has changed since it was written is made anew from the source: its shard is deleted and filled again.

    Attributes:
        report: the source's, with exact duplicates and too small pictures among its dropped rows.
        fingerprint: changes with any pair, with their order, the framing, the VAE and the text encoders.
        prompts: the distinct prompts in the order of their first pair.
        keys: a digest of (prompt, winner, loser) per pair, by which its draws are keyed.
        origins: "file:row" per pair.
        encoded: how many "pictures" and "prompts" `fill` encoded in this process.
    """

    keys: Sequence[str]
    prompts: Sequence[str]
    origins: Sequence[str]

    def __init__(
        self,
        index: Index,
        directory: Path,
        refill: Callable[[Damaged], CachedPairs],
        encoded: Counter[str] | None = None,
        held: cache_use.Hold | None = None,
    ) -> None:
        self.report, self.keys, self.prompts, self.origins = index.report, index.keys, index.prompts, index.origins
        self.fingerprint = index.fingerprint
        self._index, self._refill = index, refill
        self.encoded, self._held = encoded or Counter(), held
        self._reader = Reader([directory / name for name in index.shards])

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, index: int) -> CachedPair:
        """The pair at this place in the source's order."""
        winner, loser = self._sound(lambda: [self._reader.read(shard, row) for shard, row in self._index.images(index)])
        return CachedPair(
            Moments(winner["mean"], winner["std"]),
            Moments(loser["mean"], loser["std"]),
            winner["geometry"],
            loser["geometry"],
            self._index.prompt(index),
            self._index.label(index),
        )

    def prompt_index(self, index: int) -> int:
        """The pair's prompt, without reading its images."""
        return self._index.prompt(index)

    def size(self, index: int) -> Size:
        """(height, width) of the pair's pictures in pixels, without reading them."""
        return self._index.size(index)

    def sizes(self) -> Counter[Size]:
        """How many pairs there are of each size."""
        return self._index.sizes()

    def runs(self, indices: Sequence[int], at_most: int) -> Iterator[slice]:
        """Cuts a sequence of pairs into neighbours of one size, so many each or fewer."""
        start = 0
        for place in range(1, len(indices) + 1):
            full = place - start == at_most
            if full or place == len(indices) or self.size(indices[place]) != self.size(indices[start]):
                yield slice(start, place)
                start = place

    def conditioning(self, prompt_indices: list[int]) -> Conditioning:
        """A batch of prompts in this order; -1 is the empty prompt."""
        rows = self._sound(lambda: [self._reader.read(*self._index.text(prompt)) for prompt in prompt_indices])
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def shards(self) -> list[str]:
        """Paths, below the cache's directory, of the files that hold these pairs."""
        return list(self._index.shards)

    def close(self) -> None:
        """Lets go of the files; nothing can be read afterwards."""
        self._reader.close()
        if self._held is not None:
            self._held.close()

    def _sound(self, read: Callable[[], list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
        for _ in range(ATTEMPTS):
            try:
                return read()
            except Damaged as error:
                self._mend(error)
        return read()

    def _mend(self, damage: Damaged) -> None:
        self._reader.close()
        fresh = self._refill(damage)
        if fresh.fingerprint != self.fingerprint:
            raise LoraDpoError(
                f"{damage.path}: this part of the cache is damaged, and the data has changed since the run began\n"
                "  → start again"
            )
        self._index, self._reader = fresh._index, fresh._reader


def fill(
    source: PreferenceSource,
    family: Family,
    directory: Path | str,
    framing: Framing | int,
    progress: Progress | None = None,
    *,
    tell: Callable[[str], None] | None = None,
    about: str = "",
    images_per_batch: int | None = None,
    bytes_per_shard: int = 64 << 20,
) -> CachedPairs:
    """Encodes what is not there yet and returns the source's pairs in its order, exact duplicates left out.

    The family's encoders are released once something was encoded. Several processes may fill the same directory at
    once: they divide the work.

    Args:
        framing: the pictures' sizes and crops; a number is the side of centre squares.
        progress: called with (done, total or None, what is being done), with 0 done when that begins.
        tell: called with a line on damaged shards, and on other processes that are waited for.
        about: what these pairs are, for people who look into the cache.
        images_per_batch: by default 32, and fewer where 32 pictures would have more than about two million pixels.
        bytes_per_shard: about so much is lost when a fill is killed.

    Raises:
        UserError: sizes that the model can't take, a source without a usable pair, a directory that can't be written.
        LoraDpoError: moments or embeddings that are not finite, naming the images' origins.
    """
    framing = Framing(framing) if isinstance(framing, int) else framing
    framing.require(family.latent_scale, family.size_multiple)
    say = tell or (lambda _: None)
    directory = Path(directory)
    made_by = family.fingerprint()
    path = index_path(source, family, directory, framing)
    vae, text = _made_by(family, framing)
    groups = moments_folders(framing, (VERSION, made_by["vae"]))
    held = cache_use.hold(path, [*groups.values(), f"prompts-{text}"], about, say)
    encoded: Counter[str] = Counter()

    def refill(damage: Damaged) -> CachedPairs:
        if not _sound(damage.path):  # else another process has mended it by now
            say(_again(damage))
            discard(damage.path)
        return opened()

    def opened() -> CachedPairs:
        for _ in range(ATTEMPTS):
            index = cache_index.read(path)
            if index is not None and not _damaged(directory, index, say):
                return CachedPairs(index, directory, refill, encoded, held)
            build()
        raise LoraDpoError(
            f"{directory}: what was written here is gone or has changed at once\n"
            "  → see that nothing else deletes files there, and that the disk is sound"
        )

    def build() -> None:
        batch = images_per_batch or default_images_per_batch(framing.resolution)
        bytes_per_image = 8 * family.latent_channels * (framing.resolution // family.latent_scale) ** 2
        about = {"family": family.name, "version": VERSION}
        work = Work(
            family,
            PictureStores(
                directory, framing, (VERSION, made_by["vae"]), about | {"kind": "moments", "vae": made_by["vae"]}
            ),
            Store(
                directory / f"prompts-{text}",
                about | {"kind": "prompts", "text_encoders": made_by["text_encoders"]},
                bytes_per_shard,
            ),
            framing,
            batch,
            batch * max(1, -(-bytes_per_shard // (bytes_per_image * batch))),
            directory / f"locks-{path.stem.removeprefix('pairs-')}",
            progress,
            say,
            encoded,
        )
        for damage in (*work.images.damaged, *work.texts.damaged):
            say(_again(damage))
        draft, report = cache_fill.encode_images(source, work)
        cache_fill.encode_prompts(draft.prompts, work)
        cache_index.write(
            path,
            draft,
            report,
            digest(f"{vae}{text}", *draft.keys),
            work.images.place,
            [below(work.texts, digest(prompt)) for prompt in (*draft.prompts, EMPTY)],
        )
        cache_fill.finish(work)

    try:
        return opened()
    except BaseException:
        if held is not None:
            held.close()
        raise


def index_path(source: PreferenceSource, family: Family, directory: Path, framing: Framing) -> Path:
    """The file that `fill` writes last; its presence means that the pairs are encoded."""
    return directory / f"pairs-{digest(source.fingerprint(), *_made_by(family, framing))}.safetensors"


def _made_by(family: Family, framing: Framing) -> tuple[str, str]:
    """Digests of what makes the pictures' rows, and of what makes the prompts'."""
    made_by = family.fingerprint()
    return digest(VERSION, made_by["vae"], *framing.settings()), digest(VERSION, made_by["text_encoders"])


def default_images_per_batch(resolution: int) -> int:
    """32, and fewer where 32 squares would have more than about two million pixels; no size has more than they."""
    return max(1, min(32, (1 << 21) // resolution**2))


def _damaged(directory: Path, index: Index, tell: Callable[[str], Any]) -> list[Damaged]:
    """The shards that are missing or that can't be opened; the latter are deleted."""
    found = []
    for name in index.shards:
        try:
            Shard(directory / name).close()
        except Damaged as error:
            found.append(error)
            if (directory / name).exists():
                tell(_again(error))
                discard(directory / name)
    return found


def _sound(path: Path) -> bool:
    try:
        Shard(path).verify()
    except Damaged:
        return False
    return True


def _again(damage: Damaged) -> str:
    name = "/".join(damage.path.parts[-2:])
    return f"the cache's {name} is damaged ({damage.reason}): encoding it again"
