"""How many copies of a picture `lora-dpo data check` finds, by what was done to the copy.

    python benchmarks/lookalikes.py --pictures 300

Pictures are the tiny world's. A copy is found if its look is near the original's and they share one of the keys that
decide which pictures are compared. Beside it, how many of all other pictures the original is taken for. Prints a table,
and a last line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable

from PIL import Image, ImageEnhance

from lora_dpo import tinyworld
from lora_dpo.data.images import decode
from lora_dpo.data.lookalikes import Look, look
from lora_dpo.data.pickapic import PickAPicParquet


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def copy(picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return copy


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 90": jpeg(90),
    "JPEG, quality 70": jpeg(70),
    "two thirds of the size": lambda picture: picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)),
    "a tenth brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
}


def found(one: Look, other: Look) -> bool:
    return one.alike(other) and bool(set(one.near_keys()) & set(other.near_keys()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    chosen = parser.parse_args()
    pictures: dict[bytes, Image.Image] = {}
    for pair in PickAPicParquet(tinyworld.preferences_path()):
        pictures |= {data: decode(data, pair.origin) for data in (pair.winner, pair.loser) if data not in pictures}
        if len(pictures) >= chosen.pictures:
            break
    originals = list(pictures.values())[: chosen.pictures]
    looks = [look(picture) for picture in originals]
    shares = {
        name: sum(found(one, look(copy(picture))) for one, picture in zip(looks, originals, strict=True)) / len(looks)
        for name, copy in COPIES.items()
    }
    others = sum(found(one, other) for n, one in enumerate(looks) for other in looks[:n])
    for name, share in shares.items():
        print(f"{name:<24}{share:.0%} found")
    print(f"{others} of {len(looks) * (len(looks) - 1) // 2:,} pairs of different pictures taken for copies")
    print(json.dumps({"pictures": len(looks), "found": shares, "different_pictures_taken_for_copies": others}))


if __name__ == "__main__":
    main()
