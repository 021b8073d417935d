"""Is training going wrong? Rules over the lines of `metrics.jsonl`, and nothing else: a resumed run judges alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median

SPIKE_STEPS = 5
DRIFT_STEPS = 50
HISTORY_STEPS = 100
DRIFT = 1.05

Line = Mapping[str, float]


class Watch:
    """Fed every step's line, in order.

    A spike: over the last 5 steps, the policy's error on the winners was more than `spike_factor` times the
    reference's on the same draws. At twice the base's error a model draws noise. Methods without a reference are
    judged by their loss, against its median over the 100 steps before.

    Drift: over the last 50 steps both errors of the policy, the winner's too, lay more than 5 % above the reference's.
    DPO needs the loser's to rise only; if both do, pictures get worse while the loss falls.

    Args:
        spike_factor: None: spikes are not looked for.
        lines: those that are there already.
    """

    def __init__(self, spike_factor: float | None, lines: Iterable[Line] = ()) -> None:
        self._factor = spike_factor
        self._lines: deque[Line] = deque(maxlen=HISTORY_STEPS + SPIKE_STEPS)
        self._drifting = False
        for line in lines:
            self._lines.append(line)
            self.drift()

    def see(self, line: Line) -> None:
        self._lines.append(line)

    def spike(self) -> str | None:
        """What is wrong at the newest line, or None."""
        if self._factor is None or len(self._lines) < SPIKE_STEPS:
            return None
        recent = list(self._lines)[-SPIKE_STEPS:]
        if "ref_error_winner" in recent[-1]:
            ratio = _ratio(recent, "winner")
            if ratio > self._factor:
                return f"the policy's error on the preferred images is {ratio:.1f} times the reference's"
            return None
        before = [line["loss"] for line in list(self._lines)[:-SPIKE_STEPS]]
        if len(before) < SPIKE_STEPS:
            return None
        usual, now = median(before), fmean(line["loss"] for line in recent)
        return f"the loss is {now / usual:.1f} times its median" if now > self._factor * usual else None

    def drift(self) -> str | None:
        """Said once when it begins; None while it lasts and otherwise."""
        recent = list(self._lines)[-DRIFT_STEPS:]
        if len(recent) < DRIFT_STEPS or "ref_error_loser" not in recent[-1]:
            return None
        winner, loser = _ratio(recent, "winner"), _ratio(recent, "loser")
        drifting = min(winner, loser) > DRIFT
        began, self._drifting = drifting and not self._drifting, drifting
        if not began:
            return None
        return (
            f"step {recent[-1]['step']}: over {DRIFT_STEPS} steps the errors of preferred and rejected images rose "
            f"above the reference's, by {winner - 1:.0%} and {loser - 1:.0%}: pictures may get worse while the loss "
            "falls; a lower learning rate, fewer steps or a larger beta keep the adapter nearer to the base"
        )


def _ratio(lines: list[Line], side: str) -> float:
    reference = sum(line[f"ref_error_{side}"] for line in lines)
    return sum(line[f"error_{side}"] for line in lines) / reference if reference else 1.0
