"""The rules over metrics: what is said, when, and once."""

from __future__ import annotations

import pytest

from lora_dpo.watch import Watch


def line(step: int, winner: float = 1.0, loser: float = 1.0, loss: float = 0.7) -> dict[str, float]:
    return {
        "step": step, "loss": loss, "error_winner": winner, "error_loser": loser, "ref_error_winner": 1.0,
        "ref_error_loser": 1.0,
    }  # fmt: skip


def fed(watch: Watch, found: list[dict[str, float]]) -> list[int]:
    """Steps at which a spike is seen."""
    seen = []
    for one in found:
        watch.see(one)
        if watch.spike() is not None:
            seen.append(int(one["step"]))
    return seen


def test_a_spike_needs_five_steps_on_average():
    assert fed(Watch(2.0), [line(n, 3.0 if n == 20 else 1.0) for n in range(40)]) == []
    assert fed(Watch(2.0), [line(n, 3.0 if n >= 20 else 1.0) for n in range(24)]) == [22, 23]
    assert fed(Watch(None), [line(n, 30.0) for n in range(40)]) == []


def test_without_a_reference_the_loss_is_judged_by_its_median():
    losses = [{"step": n, "loss": 5.0 if n >= 30 else 0.5} for n in range(35)]
    assert fed(Watch(4.0), losses) == [31, 32, 33, 34]
    assert fed(Watch(4.0), [{"step": n, "loss": 0.5 + n % 3} for n in range(200)]) == []


def test_a_resumed_watch_judges_alike():
    found = [line(n, 3.0 if n >= 20 else 1.0) for n in range(24)]
    assert fed(Watch(2.0, found[:21]), found[21:]) == [22, 23]


def drifts(watch: Watch, found: list[dict[str, float]]) -> list[int]:
    seen = []
    for one in found:
        watch.see(one)
        if watch.drift() is not None:
            seen.append(int(one["step"]))
    return seen


@pytest.mark.parametrize(("winner", "loser", "said"), [(1.2, 1.3, True), (1.0, 1.5, False), (0.9, 1.5, False)])
def test_drift_is_when_both_errors_rise_and_is_said_once(winner, loser, said):
    found = [line(n) for n in range(60)] + [line(n, winner, loser) for n in range(60, 200)]
    assert len(drifts(Watch(None), found)) == (1 if said else 0)


def test_drift_that_came_back_is_said_again():
    bad, good = [line(n, 1.2, 1.2) for n in range(60)], [line(n) for n in range(60, 160)]
    assert len(drifts(Watch(None), [*bad, *good, *bad])) == 2
    assert len(drifts(Watch(None, [*bad, *good]), bad)) == 1
    assert drifts(Watch(None, bad), bad) == []
