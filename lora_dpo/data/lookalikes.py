"""Pictures that look alike though their bytes differ: a perceptual hash, and coarse colours beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE, COLOURS = 8, 4
# Levels by which neighbours have to differ: the noise of JPEG in flat areas stays below it.
STEP = 4
BITS = SIDE * SIDE * 3 * 2
NEAR_BITS, NEAR_LEVELS, KEY_LEVELS = 24, 16, 16


@dataclass(frozen=True)
class Look:
    """What a picture looks like, in 96 bytes.

    Attributes:
        hash: a difference hash of 384 bits: where each colour rises and where it falls from left to right, on a grid
            of 8 × 8. Rises and falls apart, as plain areas are neither.
        colours: the mean colours of 4 × 4 fields, which the hash doesn't tell apart.
    """

    hash: bytes
    colours: bytes

    def bits_apart(self, other: Look) -> int:
        """In how many bits the hashes differ."""
        return (int.from_bytes(self.hash) ^ int.from_bytes(other.hash)).bit_count()

    def same_colours(self, other: Look) -> bool:
        levels = [np.frombuffer(look.colours, np.uint8).astype(np.int16) for look in (self, other)]
        return bool(np.abs(levels[0] - levels[1]).max() <= NEAR_LEVELS)

    def near_keys(self) -> tuple[bytes, bytes]:
        """Of two pictures that are alike, most have one of these in common: the colours of the quarters, in steps.

        Steps that begin at two places, so that a colour at the border of one isn't at that of the other.
        """
        half = COLOURS // 2
        fields = np.frombuffer(self.colours, np.uint8).reshape(2, half, 2, half, 3).mean(axis=(1, 3))
        low, high = (((fields + shift) // KEY_LEVELS).astype(np.uint8).tobytes() for shift in (0, KEY_LEVELS / 2))
        return b"l" + low, b"h" + high

    def alike(self, other: Look) -> bool:
        return self.bits_apart(other) <= NEAR_BITS and self.same_colours(other)


def look(picture: Image.Image) -> Look:
    """Of an RGB picture."""
    small = picture.resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    change = np.diff(np.asarray(small, dtype=np.int16), axis=1)
    colours = picture.resize((COLOURS, COLOURS), Image.Resampling.BOX)
    return Look(np.packbits([change > STEP, change < -STEP]).tobytes(), colours.tobytes())
