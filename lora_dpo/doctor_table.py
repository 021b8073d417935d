"""The doctor's findings as people read them: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from lora_dpo.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@contextlib.contextmanager
def waiting(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Scope with a line on a terminal that says what is examined; gone at the end."""
    if not stream.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(file=stream).status("examining") as status:
        yield lambda what: status.update(f"examining {what}")


def show(findings: Sequence[Finding], stream: TextIO) -> None:
    """Writes them to `stream`, and a last line with the verdict."""
    if stream.isatty():
        from rich.console import Console

        draw(findings, Console(file=stream))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.status:<7}  {finding.name:<{width}}  {finding.value}", file=stream)
        if finding.advice:
            print(f"{'':<7}  {'':<{width}}  → {finding.advice}", file=stream)
    print(verdict(findings), file=stream)


def draw(findings: Sequence[Finding], console: Console) -> None:
    """One block per group, advice dim below what it is about."""
    from rich.table import Table
    from rich.text import Text

    width = max(len(finding.name) for finding in findings)
    for group, members in itertools.groupby(findings, key=lambda finding: finding.group):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=2, justify="right")
        table.add_column(min_width=width)
        table.add_column(overflow="fold")
        for finding in members:
            mark, colour = _MARKS[finding.status]
            value = Text(finding.value, style="" if finding.status == "ok" else colour)
            if finding.advice:
                value.append(f"\n→ {finding.advice}", style="dim")
            table.add_row(Text(mark, style=f"bold {colour}"), Text(finding.name, style="bold"), value)
        console.print(Text(group, style="bold cyan"))
        console.print(table)
    worst = next((s for s in ("problem", "warning", "ok") if any(f.status == s for f in findings)), "ok")
    console.print(Text(f"\n{verdict(findings)}", style=f"bold {_MARKS[worst][1]}"))


def verdict(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    told = [f"{n} {status}{'s' if n > 1 else ''}" for status in ("problem", "warning") if (n := counts[status])]
    if counts["problem"]:
        return f"{' and '.join(told)}: runs will fail until the problems are mended"
    return f"ready to train{f', with {told[0]}' if told else ''}"
