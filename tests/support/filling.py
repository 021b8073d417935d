"""Processes that fill, or prune, one cache at the same time.

`python -m tests.support.filling DIRECTORY` fills `DIRECTORY/cache` by two processes, while a third one prunes it over
and over, and prints what each of them did as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

from lora_dpo import cache_files, cache_use
from lora_dpo.cache import CachedPairs, fill
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.families.stable_diffusion import StableDiffusion


def filled(folder: Path, cache: Path, seconds_per_picture: float = 0.0) -> CachedPairs:
    """`folder`'s base and pairs, one shard per picture."""
    family = StableDiffusion(folder / "base")
    encode = family.encode_images

    def slowly(pixels):
        time.sleep(seconds_per_picture)
        return encode(pixels)

    family.encode_images = slowly  # pyright: ignore
    return fill(PickAPicParquet(folder / "pairs.parquet"), family, cache, 32, images_per_batch=1, bytes_per_shard=1)


def pruned(directory: Path) -> dict[str, int]:
    with cache_use.pruning(directory):
        plan = cache_files.to_prune(cache_files.survey(directory, []), lambda _: False)
        freed, failed = cache_files.delete(directory, {path: size for path, (size, _) in plan.files.items()})
    return {"files": len(plan.files), "bytes": freed, "failed": len(failed)}


def main(folder: Path) -> None:
    """Forks, so that everything is imported once; before anything was computed, which threads wouldn't survive."""
    context = multiprocessing.get_context("fork")
    ready, filled_by = context.Barrier(3), context.Barrier(3)
    over = context.Event()
    queue = context.Queue()

    def fills() -> None:
        ready.wait(60)
        pairs = filled(folder, folder / "cache", 0.05)
        queue.put(dict(pairs.encoded))
        filled_by.wait(60)
        over.wait(60)  # the pairs are in use until then
        pairs.close()

    def prunes() -> None:
        (folder / "cache").mkdir()
        ready.wait(60)
        rounds = []
        while filled_by.n_waiting < 2:
            rounds.append(pruned(folder / "cache")["files"])
            time.sleep(0.02)
        rounds.append(pruned(folder / "cache")["files"])
        filled_by.wait(60)
        queue.put({"rounds": len(rounds), "files": sum(rounds)})
        over.set()

    started = [context.Process(target=target) for target in (fills, fills, prunes)]
    for process in started:
        process.start()
    print(json.dumps([queue.get(timeout=60) for _ in started]))
    for process in started:
        process.join(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
