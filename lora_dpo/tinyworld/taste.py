"""The tiny world's preference function: what makes one picture better than another, for one caption.

A picture's utility is the sum of an alignment part (does it show what was asked) and an aesthetic part that no caption
names (shaded rather than flat, large rather than small, vivid rather than muted). Annotators see utilities through
Bradley-Terry noise, weigh the two parts differently, and call close pictures a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..randomness import numpy_generator

if TYPE_CHECKING:
    from .verifier import Measurement

SHADING, OBJECT_SIZE, VIVIDNESS = 0.5, 0.25, 0.25  # weights of the aesthetic part; they sum to 1
STRICT, MEAN = 0.5, 0.5  # weights of the alignment part
SHARPNESS = 8.0  # Bradley-Terry: a utility gap of 0.25 is seen correctly by 88 % of the annotators
TIE_BELOW = 0.06  # a perceived gap smaller than this is called a tie
ANNOTATORS = 24


def aesthetic(measured: Measurement) -> float:
    """The uncaptioned part, 0 (flat, smallest, muted) to 1 (shaded, largest, vivid)."""
    parts = (measured.style_shading, measured.size, measured.vividness)
    clipped = (min(1.0, max(0.0, 0.0 if math.isnan(p) else p)) for p in parts)
    return sum(w * p for w, p in zip((SHADING, OBJECT_SIZE, VIVIDNESS), clipped, strict=True))


def alignment(measured: Measurement) -> float:
    """The captioned part, 0 (nothing asked for is there) to 1 (everything is)."""
    return STRICT * float(measured.strict) + MEAN * measured.mean


def utility(measured: Measurement) -> float:
    """The preference score of a picture for its caption: alignment plus aesthetics, 0 to 2."""
    return alignment(measured) + aesthetic(measured)


@dataclass(frozen=True)
class Annotator:
    """One simulated person: how much more than average they weigh beauty against alignment."""

    name: str
    leaning: float  # −1 looks only at alignment … 1 looks only at beauty

    def gap(self, first: Measurement, second: Measurement) -> float:
        """The utility gap as this person weighs it."""
        return (1 - self.leaning) * (alignment(first) - alignment(second)) + (1 + self.leaning) * (
            aesthetic(first) - aesthetic(second)
        )


def annotator(seed: int, index: int) -> Annotator:
    """One of the `ANNOTATORS` people of a seed."""
    leaning = float(numpy_generator(seed, "annotator", index).uniform(-0.35, 0.35))
    return Annotator(f"annotator-{index:02d}", leaning)


def label(seed: int, key: str, first: Measurement, second: Measurement) -> tuple[float, float, str]:
    """One judgement: (label of `first` in {0, 0.5, 1}, the noise-free label, the annotator's name)."""
    rng = numpy_generator(seed, "judgement", key)
    person = annotator(seed, int(rng.integers(ANNOTATORS)))
    uniform = float(rng.uniform(1e-9, 1 - 1e-9))
    noise = math.log(uniform / (1 - uniform)) / SHARPNESS  # logistic noise makes the choice Bradley-Terry
    gap = person.gap(first, second)
    seen = 0.5 if abs(gap + noise) < TIE_BELOW else float(gap + noise > 0)
    clean = utility(first) - utility(second)
    return seen, 0.5 if clean == 0 else float(clean > 0), person.name
