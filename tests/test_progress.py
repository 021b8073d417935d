"""Progress: lines that parse, a bar on a terminal, silence on request."""

from __future__ import annotations

import io

from lora_dpo.progress import PlainProgress, Progress, RichProgress, make_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parsed(stream: io.StringIO) -> list[dict[str, str]]:
    return [dict(field.split("=") for field in line.split(" ")) for line in stream.getvalue().splitlines()]


def test_plain_lines_come_at_intervals_and_at_the_end():
    stream, now = io.StringIO(), [100.0]
    progress = PlainProgress(stream, interval_seconds=10.0, clock=lambda: now[0])
    progress.start(20, "encoding images")
    for step in range(20):
        now[0] += 2.0
        progress.advance(1, loss=0.5 + step)
    rows = parsed(stream)
    assert [row["done"] for row in rows] == ["1", "6", "11", "16", "20"]
    assert rows[1] == {
        "what": "encoding_images",
        "done": "6",
        "total": "20",
        "per_second": "0.5",
        "eta_seconds": "28",
        "loss": "5.5",
    }


def test_after_a_resume_the_rate_is_this_process_s_and_the_rest_what_is_left():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, interval_seconds=10.0, clock=lambda: now[0])
    progress.start(100, "train", done=90)
    for _ in range(10):
        now[0] += 20.0
        progress.advance(1)
    rows = parsed(stream)
    assert [row["done"] for row in rows] == [str(n) for n in range(91, 101)]
    assert {row["per_second"] for row in rows} == {"0.05"}
    assert [row["eta_seconds"] for row in rows] == [str(20 * left) for left in range(9, -1, -1)]


def test_going_back_behind_the_start_is_no_failure():
    """A run that was interrupted at step 9 and meets a spike at 13 goes on from 8."""
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, interval_seconds=10.0, clock=lambda: now[0])
    progress.start(20, "train", done=9)
    for n in (1, 1, 1, -4, 1):
        now[0] += 20.0
        progress.advance(n)
    assert [(row["done"], row["per_second"]) for row in parsed(stream)] == [
        ("10", "0.05"), ("11", "0.05"), ("12", "0.05"), ("8", "0.0375"), ("9", "0.04"),
    ]  # fmt: skip
    progress.start(20, "train", done=9)
    now[0] += 20.0
    progress.advance(-1)
    assert "per_second" not in stream.getvalue().splitlines()[-1]


def test_the_bar_goes_on_where_it_was():
    stream = Terminal()
    progress = make_progress(stream)
    progress.start(10, "train", done=7)
    progress.advance(1, heldout_accuracy=0.625)
    progress.advance(-4)
    progress.advance(1)
    progress.stop()
    shown = stream.getvalue()
    assert "5/10" in shown
    assert "/s" in shown or "s each" in shown


def test_quiet_keeps_messages_only():
    stream = io.StringIO()
    progress = make_progress(stream, quiet=True)
    progress.start(1, "train")
    progress.advance(1, loss=1.0)
    progress.message("resumed at step 3")
    progress.stop()
    assert stream.getvalue() == "resumed at step 3\n"


def test_the_terminal_gets_a_bar_with_metrics():
    stream = Terminal()
    progress = make_progress(stream)
    assert isinstance(progress, RichProgress)
    progress.start(4, "train")
    progress.advance(3, loss=0.625, implicit_accuracy=0.75)
    progress.message("a [bracketed] message")
    progress.stop()
    shown = stream.getvalue()
    for text in ("train", "3/4", "loss 0.625", "accuracy 0.75", "a [bracketed] message"):
        assert text in shown


def test_both_are_progress_and_a_pipe_gets_plain_lines():
    plain = make_progress(io.StringIO())
    assert isinstance(plain, PlainProgress)
    assert isinstance(plain, Progress)
    assert isinstance(RichProgress(io.StringIO()), Progress)
