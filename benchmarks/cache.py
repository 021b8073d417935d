"""What a cache of many pairs costs: filling, opening, reading in training's order, and memory, by number of pairs.

    python benchmarks/cache.py --pairs 1000 10000 100000 --opened 851293

Everything is the real code but for the networks: pictures of 64×64 pixels are read from a parquet file in Pick-a-Pic's
columns, decoded, hashed, cropped, "encoded" by averaging pixels to rows of the tiny world's size (mean and standard
deviation of 4×16×16, float32), and stored; one prompt per 14 pairs, as in Pick-a-Pic. Every phase is a process of its
own, so that its memory is its own: the growth of RssAnon (/proc/self/status), which leaves out pages of mapped files.

- fill: from nothing; pairs per second, and anonymous memory at its end.
- again: everything is there: hashing the source's bytes, then opening the index and every shard.
- read: `PairStream` in its keyed order, in batches of 32, with draws; first with the files dropped from the page cache,
  as far as the system lets them go, then warm; and the rows alone, without draws.
- opened: an index of `--opened` pairs over shards of 128 rows, as 64 MB of SDXL's rows at 1024 pixels are, with rows of
  a few bytes: time to open, and reading across so many shards.
- hash: one file's digest, made and remembered.
- rows of SDXL at 1024 pixels, 2 × `--true-size` of them: bytes per second.

Prints tables, and a last line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from lora_dpo import cache_index, file_digests
from lora_dpo.cache import CachedPairs, fill, index_path
from lora_dpo.cache_index import Draft, Index
from lora_dpo.cache_pictures import below
from lora_dpo.cache_store import Shard, Store, digest
from lora_dpo.data import SourceReport
from lora_dpo.data.framing import Framing
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.families import Family, Moments
from lora_dpo.families.schedule import Schedule
from lora_dpo.methods.stream import PairStream

BATCH = 32
PAIRS_PER_PROMPT = 14
RESOLUTION = 64


class Averages(Family):
    """No network: pictures become averages of their pixels, prompts become numbers."""

    name = "averages"
    latent_scale, size_multiple, latent_channels, resolution = 4, 4, 4, RESOLUTION

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.schedule = Schedule({"num_train_timesteps": 1000})

    @property
    def denoiser(self):
        raise AssertionError("nothing is denoised here")

    def encode_images(self, pixels):
        means = F.avg_pool2d(pixels, 4)
        mean = torch.cat([means, means[:, :1]], dim=1)
        return Moments(mean, torch.full_like(mean, 0.1))

    def encode_prompts(self, prompts):
        numbers = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.float32)
        return {"prompt_embeds": numbers[:, None, None].repeat(1, 32, 192), "pooled": numbers[:, None].repeat(1, 96)}

    def latents(self, moments, noise):
        return moments.mean + moments.std * noise

    def with_geometry(self, conditioning, geometry):
        return {**conditioning, "time_ids": geometry.float()}

    def release_encoders(self) -> None:
        pass

    def fingerprint(self) -> dict[str, str]:
        return {"vae": "averages", "text_encoders": "lengths", "unet": "none"}

    cut_prompts = predict = decode = release = pipeline = release_encoders  # pyright: ignore


def write_pairs(path: Path, count: int) -> None:
    """Distinct pictures of a few colours, each with its number in its first pixels."""
    schema = pa.schema(
        [("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("caption", pa.string())]
    )
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 1000):
            numbers = range(start, min(count, start + 1000))
            rows = {
                "jpg_0": [png(rng, 2 * number) for number in numbers],
                "jpg_1": [png(rng, 2 * number + 1) for number in numbers],
                "label_0": [1.0 for _ in numbers],
                "caption": [f"a picture with the number {number // PAIRS_PER_PROMPT}" for number in numbers],
            }
            writer.write_table(pa.table(rows, schema=schema), row_group_size=100)


def png(rng: np.random.Generator, number: int) -> bytes:
    pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    pixels[0, :3] = np.frombuffer(number.to_bytes(9, "little"), np.uint8).reshape(3, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def anonymous_mib() -> float:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system doesn't tell RssAnon")


def source(folder: Path) -> PickAPicParquet:
    return PickAPicParquet(folder / "pairs.parquet")


def fills(folder: Path) -> dict[str, float]:
    base, began = anonymous_mib(), time.perf_counter()
    pairs = fill(source(folder), Averages(), folder / "cache", RESOLUTION)
    seconds = time.perf_counter() - began
    peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) / 1024
    return {
        "pairs": len(pairs),
        "seconds": seconds,
        "pairs_per_second": len(pairs) / seconds,
        "anonymous_mib": anonymous_mib() - base,
        "peak_resident_mib": peak,
        "bytes": sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()),
        "source_bytes": (folder / "pairs.parquet").stat().st_size,
    }


def again(folder: Path) -> dict[str, float]:
    base, began = anonymous_mib(), time.perf_counter()
    source(folder).fingerprint()
    hashed = time.perf_counter() - began
    began = time.perf_counter()
    pairs = fill(source(folder), Averages(), folder / "cache", RESOLUTION)
    total = time.perf_counter() - began
    path = index_path(source(folder), Averages(), folder / "cache", Framing(RESOLUTION))
    began = time.perf_counter()
    Index(path)
    return {
        "hash_seconds": hashed,
        "open_seconds": max(0.0, total - hashed),
        "index_seconds": time.perf_counter() - began,
        "index_bytes": path.stat().st_size,
        "shards": len(pairs.shards()),
        "anonymous_mib": anonymous_mib() - base,
    }


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(path: Path) -> CachedPairs:
    def refuse(damage):
        raise damage

    return CachedPairs(Index(path), path.parent, refill=refuse)


def reads(folder: Path, limit: int) -> dict[str, float]:
    path = index_path(source(folder), Averages(), folder / "cache", Framing(RESOLUTION))
    drop_from_page_cache(folder)
    base = anonymous_mib()
    pairs = opened(path)
    stream = PairStream(pairs, Averages(), seed=0, batch_pairs=BATCH)
    stream.batch(0)
    result = {"anonymous_mib_opened": anonymous_mib() - base}
    steps = max(1, min(len(pairs), limit) // BATCH)
    for name in ("cold", "warm"):
        began = time.perf_counter()
        for step in range(steps):
            for part in stream.batch(step).parts():
                assert len(part) == BATCH
        result[f"{name}_pairs_per_second"] = steps * BATCH / (time.perf_counter() - began)
    began = time.perf_counter()
    for step in range(steps):
        indices = stream.batch(step).indices
        read = [pairs.pair(index) for index in indices]
        pairs.conditioning([pair.prompt for pair in read])
    result["rows_pairs_per_second"] = steps * BATCH / (time.perf_counter() - began)
    return result | {"read_pairs": steps * BATCH, "anonymous_mib": anonymous_mib() - base}


def write_many(folder: Path, count: int) -> None:
    """An index and its shards as a fill leaves them, with rows of 32 bytes."""
    (folder / "cache").mkdir()
    pictures, prompts = 2 * count, -(-count // PAIRS_PER_PROMPT)
    images = Store(folder / "cache" / f"moments-{'0' * 32}", {"kind": "moments"})
    for start in range(0, pictures, 128):
        keys = [digest(number) for number in range(start, min(pictures, start + 128))]
        images.add(keys, {"mean": torch.zeros(len(keys), 4), "std": torch.zeros(len(keys), 4)})
        images.flush()
    texts = Store(folder / "cache" / f"prompts-{'0' * 32}", {"kind": "prompts"})
    for start in range(0, prompts + 1, 206):
        keys = [digest("prompt", number) for number in range(start, min(prompts + 1, start + 206))]
        texts.add(keys, {"prompt_embeds": torch.zeros(len(keys), 8)})
        texts.flush()
    draft = Draft(
        [digest("pair", number) for number in range(count)],
        [digest(2 * number) for number in range(count)],
        [digest(2 * number + 1) for number in range(count)],
        [(RESOLUTION, RESOLUTION)] * count,
        [1.0] * count,
        [number // PAIRS_PER_PROMPT for number in range(count)],
        [f"a picture with the number {number}" for number in range(prompts)],
        [f"train-00000-of-00645.parquet:{number}" for number in range(count)],
    )

    cache_index.write(
        folder / "cache" / f"pairs-{'0' * 32}.safetensors", draft, SourceReport(count, count), "",
        lambda key: below(images, key[0]), [below(texts, digest("prompt", number)) for number in range(prompts + 1)],
    )  # fmt: skip


def opens_many(folder: Path, limit: int) -> dict[str, float]:
    path = folder / "cache" / f"pairs-{'0' * 32}.safetensors"
    base, began = anonymous_mib(), time.perf_counter()
    pairs = opened(path)
    index_seconds = time.perf_counter() - began
    result: dict[str, float] = {
        "pairs": len(pairs),
        "shards": len(pairs.shards()),
        "index_bytes": path.stat().st_size,
        "index_seconds": index_seconds,
        "anonymous_mib_opened": anonymous_mib() - base,
    }
    began = time.perf_counter()
    for name in pairs.shards():
        Shard(folder / "cache" / name).close()
    result["shards_seconds"] = time.perf_counter() - began
    order = np.random.default_rng(0).permutation(len(pairs))[:limit]
    began = time.perf_counter()
    for index in order.tolist():
        for shard, row in pairs._index.images(index):
            pairs._reader.read(shard, row)
        pairs.conditioning([pairs.prompt_index(index)])
    return result | {
        "rows_pairs_per_second": len(order) / (time.perf_counter() - began),
        "anonymous_mib": anonymous_mib() - base,
    }


def hashes(folder: Path, mib: int) -> dict[str, float]:
    os.environ["LORA_DPO_CACHE"] = str(folder)
    file_digests.TICK_SECONDS = 0.0  # the file is new
    file, block = folder / "data", np.random.default_rng(0).bytes(1 << 20)
    with file.open("wb") as opened:
        for _ in range(mib):
            opened.write(block)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        list(file_digests.file_digests([file]))
        seconds.append(time.perf_counter() - began)
    return {"mib": mib, "mib_per_second": mib / seconds[0], "remembered_seconds": seconds[1]}


def true_rows(folder: Path, count: int) -> dict[str, float]:
    store = Store(folder / "moments", {}, bytes_per_shard=64 << 20)
    generator = torch.Generator().manual_seed(0)
    keys = [digest(number) for number in range(2 * count)]
    began = time.perf_counter()
    for start in range(0, len(keys), 2):
        mean = torch.randn(2, 4, 128, 128, generator=generator)
        store.add(keys[start : start + 2], {"mean": mean, "std": mean.abs(), "geometry": torch.zeros(2, 6)})
    store.flush()
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / "moments").glob("*.safetensors"))
    drop_from_page_cache(folder)
    order = np.random.default_rng(0).permutation(len(keys))
    result = {"bytes": size, "write_mib_per_second": size / written / 2**20}
    shards = {name: Shard(folder / "moments" / name) for name in {store.place(key)[0] for key in keys}}
    for name in ("cold", "warm"):
        began = time.perf_counter()
        for number in order.tolist():
            shard, row = store.place(keys[number])
            torch.cat(list(shards[shard].row(row).values())[1:2])  # as a batch takes it into memory
        result[f"{name}_mib_per_second"] = size / (time.perf_counter() - began) / 2**20
    return result


PHASES = {"fill": fills, "again": again, "read": reads, "opened": opens_many, "true": true_rows, "hash": hashes}


def phase(name: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--phase", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    print("  ".join(f"{title:>13}" for title in columns))
    for row in rows:
        values = [row[name] for name in columns.values()]
        print("  ".join(f"{value:>13,.{0 if value >= 100 or value == int(value) else 3}f}" for value in values))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--opened", type=int, default=0, help="pairs of an index that is only opened; 0: none")
    parser.add_argument("--true-size", type=int, default=500, help="pairs with rows of SDXL's size; 0: none")
    parser.add_argument("--hash-mib", type=int, default=1024, help="size of a file whose digest is made; 0: none")
    parser.add_argument("--read", type=int, default=20_000, help="pairs that are read at most")
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--phase", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.phase:
        name, folder, *numbers = chosen.phase
        print(json.dumps(PHASES[name](Path(folder), *map(int, numbers))))
        return
    work = Path(tempfile.mkdtemp(prefix="cache-benchmark-", dir=chosen.dir))
    result: dict[str, Any] = {}
    try:
        rows = []
        for count in chosen.pairs:
            folder = work / str(count)
            folder.mkdir()
            write_pairs(folder / "pairs.parquet", count)
            row: dict[str, Any] = {"pairs": count}
            for name, more in (("fill", ()), ("again", ()), ("read", (chosen.read,))):
                row |= {f"{name}.{key}": value for key, value in phase(name, folder, *more).items()}
            rows.append(row)
            shutil.rmtree(folder)
        result["sizes"] = rows
        table(rows, {
            "pairs": "pairs", "fill pairs/s": "fill.pairs_per_second", "fill MiB": "fill.anonymous_mib",
            "hash s": "again.hash_seconds", "open s": "again.open_seconds", "open MiB": "again.anonymous_mib",
        })  # fmt: skip
        table(rows, {
            "pairs": "pairs", "read pairs/s": "read.warm_pairs_per_second", "cold": "read.cold_pairs_per_second",
            "rows alone": "read.rows_pairs_per_second", "open MiB": "read.anonymous_mib_opened",
            "read MiB": "read.anonymous_mib",
        })  # fmt: skip
        if chosen.opened:
            (work / "many").mkdir()
            write_many(work / "many", chosen.opened)
            result["opened"] = phase("opened", work / "many", chosen.read)
            table([result["opened"]], {
                "pairs": "pairs", "shards": "shards", "index s": "index_seconds", "shards s": "shards_seconds",
                "open MiB": "anonymous_mib_opened", "rows pairs/s": "rows_pairs_per_second",
                "read MiB": "anonymous_mib",
            })  # fmt: skip
            shutil.rmtree(work / "many")
        if chosen.hash_mib:
            (work / "hash").mkdir()
            result["hash"] = phase("hash", work / "hash", chosen.hash_mib)
            table([result["hash"]], {
                "MiB": "mib", "hashed MiB/s": "mib_per_second", "remembered s": "remembered_seconds"
            })  # fmt: skip
        if chosen.true_size:
            (work / "true").mkdir()
            result["true_size"] = phase("true", work / "true", chosen.true_size)
            table([result["true_size"]], {
                "bytes": "bytes", "write MiB/s": "write_mib_per_second", "cold MiB/s": "cold_mib_per_second",
                "warm MiB/s": "warm_mib_per_second",
            })  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result |= {
        "cpus": os.cpu_count(),
        "device": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
