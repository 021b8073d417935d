"""Pixels to VAE moments and prompts to embeddings, once each, stored by content and by what produced them.

```text
directory/moments-<VAE, resolution>/<digest of keys>.safetensors    mean, std, geometry of many images
directory/prompts-<text encoders>/<digest of keys>.safetensors      the conditioning of many prompts
directory/pairs-<source, VAE, resolution, text encoders>.json       which of them make up each pair
```
A shard is complete or absent, so a fill that was killed goes on from the shards it finished.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lora_dpo.cache_store import Store, write_atomically
from lora_dpo.data import PreferenceSource, SourceReport
from lora_dpo.data.images import centre_square, decode, to_pixels
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.families import Conditioning, Family, Moments, geometry

VERSION = 1
PROMPTS_PER_BATCH = 64
EMPTY = ""
Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class CachedPair:
    """One pair as batches of one, ready to be concatenated; `prompt` indexes `CachedPairs.prompts`."""

    winner: Moments
    loser: Moments
    winner_geometry: Int[Tensor, "1 6"]
    loser_geometry: Int[Tensor, "1 6"]
    prompt: int


@dataclass(frozen=True)
class _Pairs:
    """What the index file holds: digests of images, and for each pair its places in these lists."""

    keys: list[str]
    winners: list[str]
    losers: list[str]
    prompt_of: list[int]
    prompts: list[str]
    origins: list[str]


class CachedPairs:
    """The pairs of one source, read from memory-mapped shards one at a time.

    Attributes:
        report: the source's, exact duplicates among its dropped rows.
        fingerprint: changes with any pair, with their order, the resolution, the VAE and the text encoders.
        prompts: the distinct prompts in the order of their first pair.
        keys: a digest of (prompt, winner, loser) per pair, by which its draws are keyed.
        origins: "file:row" per pair.
        resolution: pixels.
    """

    def __init__(
        self, pairs: _Pairs, report: SourceReport, images: Store, texts: Store, resolution: int, identity: str
    ) -> None:
        self.report, self.keys, self.prompts, self.origins = report, pairs.keys, pairs.prompts, pairs.origins
        self.resolution = resolution
        self.fingerprint = _digest(identity, *pairs.keys)
        self._pairs, self._images, self._texts = pairs, images, texts

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, index: int) -> CachedPair:
        """The pair at this place in the source's order."""
        winner, loser = (self._images.read(names[index]) for names in (self._pairs.winners, self._pairs.losers))
        return CachedPair(
            Moments(winner["mean"], winner["std"]),
            Moments(loser["mean"], loser["std"]),
            winner["geometry"],
            loser["geometry"],
            self._pairs.prompt_of[index],
        )

    def prompt_index(self, index: int) -> int:
        """The pair's prompt, without reading its images."""
        return self._pairs.prompt_of[index]

    def conditioning(self, prompt_indices: list[int]) -> Conditioning:
        """A batch of prompts in this order; -1 is the empty prompt."""
        rows = [self._texts.read(_digest(EMPTY if i == -1 else self.prompts[i])) for i in prompt_indices]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def fill(
    source: PreferenceSource,
    family: Family,
    directory: Path | str,
    resolution: int,
    progress: Progress | None = None,
    *,
    images_per_batch: int | None = None,
    bytes_per_shard: int = 64 << 20,
) -> CachedPairs:
    """Encodes what is not there yet and returns the source's pairs in its order, exact duplicates left out.

    Images are centre squares at `resolution` pixels. The family's encoders are released once something was encoded.

    Args:
        progress: called with (done, total or None, what is being done).
        images_per_batch: by default 32, and fewer where 32 pictures would have more than about two million pixels.
        bytes_per_shard: about so much is lost when a fill is killed.

    Raises:
        UserError: a resolution the VAE can't take, a source without a usable pair, a directory that can't be written.
        LoraDpoError: moments or embeddings that are not finite, naming the images' origins.
    """
    if resolution <= 0 or resolution % family.latent_scale:
        raise UserError(f"resolution has to be a positive multiple of {family.latent_scale}, got {resolution}")
    made_by = family.fingerprint()
    vae = _digest(VERSION, made_by["vae"], resolution)
    text = _digest(VERSION, made_by["text_encoders"])
    directory = Path(directory)
    images = Store(directory / f"moments-{vae}", bytes_per_shard)
    texts = Store(directory / f"prompts-{text}", bytes_per_shard)
    index = directory / f"pairs-{_digest(source.fingerprint(), vae, text)}.json"

    known = _read_index(index)
    if known is None or not _complete(known[0], images, texts):
        batch = images_per_batch or max(1, min(32, (1 << 21) // resolution**2))
        known = _encode_images(source, family, images, resolution, batch, progress)
        _encode_prompts(known[0].prompts, family, texts, progress)
        _write_index(index, *known)
    return CachedPairs(*known, images, texts, resolution, f"{vae}{text}")


def _encode_images(
    source: PreferenceSource, family: Family, images: Store, resolution: int, batch: int, progress: Progress | None
) -> tuple[_Pairs, SourceReport]:
    pairs = _Pairs([], [], [], [], [], [])
    prompt_of: dict[str, int] = {}
    seen: set[str] = set()
    duplicates: list[str] = []
    waiting: dict[str, tuple[Tensor, Tensor, str]] = {}

    def encode() -> None:
        pixels = torch.stack([pixels for pixels, _, _ in waiting.values()])
        try:
            moments = family.encode_images(pixels)
        except LoraDpoError as error:
            origins = ", ".join(f"{place}: {origin}" for place, (_, _, origin) in enumerate(waiting.values()))
            raise LoraDpoError(f"{error} (the batch is {origins})") from error
        sizes = torch.cat([size for _, size, _ in waiting.values()])
        images.add(list(waiting), {"mean": moments.mean, "std": moments.std, "geometry": sizes})
        waiting.clear()

    encoded = False
    for preference in source:
        names = []
        for data in (preference.winner, preference.loser):
            name = _digest(data)
            names.append(name)
            if name not in images and name not in waiting:
                picture = decode(data, preference.origin)
                square, crop = centre_square(picture, resolution)
                size = geometry((picture.height, picture.width), crop, (resolution, resolution))
                waiting[name] = (to_pixels(square), size, preference.origin)
            if len(waiting) == batch:
                encode()
                encoded = True
        key = _digest(preference.prompt, *names)
        if key in seen:
            duplicates.append(preference.origin)
            continue
        seen.add(key)
        pairs.keys.append(key)
        pairs.winners.append(names[0])
        pairs.losers.append(names[1])
        pairs.origins.append(preference.origin)
        pairs.prompt_of.append(prompt_of.setdefault(preference.prompt, len(prompt_of)))
        if progress is not None:
            progress(len(pairs.keys), None, "encoding images")
    if waiting:
        encode()
        encoded = True
    images.flush()
    if encoded:
        family.release_encoders()
    if not pairs.keys:
        raise UserError("the source has no usable pair", hint=source.report.summary())
    pairs.prompts.extend(prompt_of)
    report = copy.deepcopy(source.report)
    for origin in duplicates:
        report.kept -= 1
        report.drop("duplicate pair", origin)
    return pairs, report


def _encode_prompts(prompts: Iterable[str], family: Family, texts: Store, progress: Progress | None) -> None:
    missing = [prompt for prompt in dict.fromkeys([EMPTY, *prompts]) if _digest(prompt) not in texts]
    for start in range(0, len(missing), PROMPTS_PER_BATCH):
        part = missing[start : start + PROMPTS_PER_BATCH]
        conditioning = family.encode_prompts(part)
        for name, tensor in conditioning.items():
            finite = tensor.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                prompt = part[finite.index(False)]
                raise LoraDpoError(f"the text encoder's {name} has NaN or infinite values for the prompt {prompt!r}")
        texts.add([_digest(prompt) for prompt in part], conditioning)
        if progress is not None:
            progress(start + len(part), len(missing), "encoding prompts")
    texts.flush()
    if missing:
        family.release_encoders()


def _complete(pairs: _Pairs, images: Store, texts: Store) -> bool:
    return all(name in images for names in (pairs.winners, pairs.losers) for name in names) and all(
        _digest(prompt) in texts for prompt in (EMPTY, *pairs.prompts)
    )


def _write_index(path: Path, pairs: _Pairs, report: SourceReport) -> None:
    text = json.dumps({"pairs": vars(pairs), "report": vars(report)}, ensure_ascii=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="ascii"))


def _read_index(path: Path) -> tuple[_Pairs, SourceReport] | None:
    """None where there is none, or a damaged one: it is then made anew from the source and the shards."""
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        report = SourceReport(**held["report"])
        report.dropped, report.elsewhere = Counter(report.dropped), Counter(report.elsewhere)
        return _Pairs(**held["pairs"]), report
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _digest(*parts: object) -> str:
    """Of the parts and their boundaries; bytes as they are, everything else as text."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
