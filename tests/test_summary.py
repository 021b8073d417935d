"""The last lines of a run."""

from __future__ import annotations

from lora_dpo.summary import _course


def measured(*accuracies: float) -> list[dict[str, float]]:
    return [{"step": 10 * n + 10, "accuracy": accuracy, "margin": 0.1} for n, accuracy in enumerate(accuracies)]


def test_the_course_of_training_in_one_line():
    assert _course(measured(0.5)) == "best 0.500 at step 10"
    assert _course(measured(0.5, 0.75, 0.625)) == "0.500 at step 10, best 0.750 at step 20, last 0.625 at step 30"
    assert _course(measured(0.5, 0.75)) == "0.500 at step 10, best 0.750 at step 20"
    assert _course(measured(0.75, 0.5)) == "best 0.750 at step 10, last 0.500 at step 20"
