"""The sizes that pictures are trained at, and which of them a pair gets.

Integers and fractions throughout: the same choice on every machine, whatever its logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Size = tuple[int, int]  # (height, width) in pixels


def sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """The buckets of a resolution, from the tallest to the widest.

    Sides are multiples of `step`, a bucket has at most resolution² pixels, its long side is at most `max_aspect` times
    its short one, and no other size that is allowed contains it. They come in pairs (h, w), (w, h) around the square.

    Args:
        step: pixels; divides the resolution.
        max_aspect: at least 1.
    """
    allowed = []
    for short in range(step, resolution + 1, step):
        long = min(resolution**2 // short, int(max_aspect * short)) // step * step
        allowed.append((short, long))
    # The shorter side ascends, so that only those that come later can contain one.
    upright = [
        (short, long)
        for place, (short, long) in enumerate(allowed)
        if all(long > other for _, other in allowed[place + 1 :])
    ]
    return [(long, short) for short, long in upright if long > short] + upright[::-1]


def nearest(pictures: Sequence[Size], buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to the geometric mean of the pictures' on a logarithmic scale.

    Of two that are equally near, the squarer one.
    """
    mean = Fraction(1)  # of the aspect ratios, to the power of how many there are
    for height, width in pictures:
        mean *= Fraction(height, width)

    def distance(bucket: Size) -> tuple[Fraction, Fraction]:
        quotient = Fraction(*bucket) ** len(pictures) / mean
        return max(quotient, 1 / quotient), Fraction(max(bucket), min(bucket))

    return min(buckets, key=distance)


def written(size: Size) -> str:
    """Width × height, as people write it."""
    return f"{size[1]}×{size[0]}"
