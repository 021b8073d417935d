"""What `lora-dpo data check` found, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDTH, SHOWN = 14, 8


def text(document: Mapping[str, Any]) -> str:
    """Lines from the command's JSON document."""
    return "\n".join(_lines(document))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    def line(name: str, value: str) -> str:
        return f"{name:<{WIDTH}}{value}"

    ties = f", {found['ties']:,} of them ties" if found["ties"] else ""
    yield line("data", f"{found['path']} (kind {found['kind']})")
    yield line("rows", f"{found['rows']:,}: {found['kept']:,} kept{ties}, {sum(found['dropped'].values()):,} dropped")
    for split, count in found["elsewhere"].items():
        yield line("", f"beside them {count:,} in split {split!r}")
    for reason, count in found["dropped"].items():
        yield line("dropped", f"{count:,} {reason}")
        examples = found["examples"][reason]
        yield from (line("", f"  {example}") for example in examples)
        if count > len(examples):
            yield line("", f"  and {count - len(examples):,} more")
    yield line("prompts", f"{found['prompts']:,}")
    yield line("pictures", f"{found['pictures']:,}")
    for name in ("users", "models", "sizes", "aspect_ratios"):
        if found[name]["different"]:
            yield line(name.replace("_", " "), _counts(found[name]))
    same = found["duplicates"]
    yield line(
        "duplicates",
        f"{same['rows']:,} rows; {same['pictures_that_look_like_another']:,} pictures look like another; "
        f"{same['pairs_that_look_alike']:,} pairs of look-alikes",
    )
    again = found["judged_again"]
    if again["couples"]:
        yield line(
            "label noise",
            f"{again['pairs']:,} pairs were judged more than once, {100 * again['differ']:.1f} % of two judgements "
            f"differ: about {100 * again['label_noise']:.1f} % of the labels are wrong",
        )
    else:
        yield line("label noise", "unknown: no pair was judged more than once")
    for name in ("rows_file", "sheet"):
        if found[name] is not None:
            yield line("written", found[name])
    if found["error"] is not None:
        yield line("error", found["error"])


def _counts(counts: Mapping[str, Any]) -> str:
    shown = list(counts["most"].items())[:SHOWN]
    rest = counts["different"] - len(shown)
    listed = ", ".join(f"{name} {count:,}" for name, count in shown)
    return f"{counts['different']:,}: {listed}" + (f", {rest:,} more" if rest else "")
