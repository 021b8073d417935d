"""What `lora-dpo plan` found, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_dpo.units import byte_size

WIDTH = 11


def text(document: Mapping[str, Any]) -> str:
    """Lines from the command's JSON document."""
    return "\n".join(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield from _work(document)
    yield ""
    yield from _memory(document)
    yield ""
    yield from _verdict(document)
    if document["nearest"] is not None:
        yield from _nearest(document["nearest"])
    yield from (f"{'note':<{WIDTH}}{note}" for note in document["notes"])


def _work(document: Mapping[str, Any]) -> Iterator[str]:
    data, epochs = document["data"], document["epochs"]
    passes, size = document["passes_per_step"], document["pairs_per_pass"]
    of = f"{document['batch_pairs']:,} pairs" + (f" in {passes:,} passes of {size}" if passes > 1 else "")
    again = {"none": "", "full": "; all activations are computed again"}
    checkpointing = document["gradient_checkpointing"]
    of += again.get(checkpointing, f"; activations of {checkpointing} blocks are computed again")
    seen = "" if epochs is None else f"; {epochs:,.2f} epochs"
    yield f"{'steps':<{WIDTH}}{document['steps']:,} of {of}{seen}"
    if data is None:
        yield f"{'pairs':<{WIDTH}}unknown: there are no data at data.path"
        return
    share, pairs = data["share_read"], f"{document['pairs']:,}"
    if data["from_cache"]:
        yield f"{'pairs':<{WIDTH}}{pairs}, all of them encoded: {data['summary']}"
    elif share == 1:
        yield f"{'pairs':<{WIDTH}}{pairs}; {data['summary']}"
    else:
        part = f"about {pairs}" if share else f"at least {pairs}"
        read = f"{100 * share:.1f} %" if share else "a part"
        yield f"{'pairs':<{WIDTH}}{part}; {read} was read: {data['summary']}"
    if not data["from_cache"]:
        yield f"{'':<{WIDTH}}pictures weren't decoded: broken ones are found by `lora-dpo cache`"
    buckets = ", ".join(f"{name} {count:,}" for name, count in document["buckets"].items())
    yield f"{'sizes':<{WIDTH}}{buckets}"
    cache = document["cache"]
    made = f"{cache['pictures']:,} pictures and {cache['prompts']:,} prompts"
    yield f"{'cache':<{WIDTH}}{byte_size(cache['bytes'])} for {made}, in {cache['directory']}"


def _memory(document: Mapping[str, Any]) -> Iterator[str]:
    names = list(document["parts_gib"])
    columns = ["peak", *names]
    title = "GiB on a GPU" if document["device"] == "cuda" else "GiB"
    width = max(len(title), *(len(name) for name in document["phases"]))
    yield f"{title:<{width}}" + "".join(f"{name:>{max(len(name), 5) + 2}}" for name in columns)
    for phase, found in document["phases"].items():
        values = [found["peak_gib"], *(found["parts_gib"][name] for name in names)]
        cells = (f"{value:.2f}" if value >= 0.005 else "-" for value in values)
        yield f"{phase:<{width}}" + "".join(
            f"{cell:>{max(len(name), 5) + 2}}" for name, cell in zip(columns, cells, strict=True)
        )


def _verdict(document: Mapping[str, Any]) -> Iterator[str]:
    yield f'{"peak":<{WIDTH}}{document["peak_gib"]:.2f} GiB, in the phase "{document["peak_phase"]}"'
    if document["device"] == "cuda":
        allowed = document["allowance_gib"]
        yield f"{'allowance':<{WIDTH}}{allowed:.2f} GiB for CUDA itself, fragments and libraries: not traced"
        yield f"{'needed':<{WIDTH}}{document['needed_gib']:.2f} GiB"
    if document["fits"] is not None:
        room, left = document["gpu_gib"], document["gpu_gib"] - document["needed_gib"]
        verdict = f"yes, {left:.2f} GiB are left" if document["fits"] else f"no, {-left:.2f} GiB are lacking"
        yield f"{'fits':<{WIDTH}}{room:.2f} GiB: {verdict}"


def _nearest(found: Mapping[str, Any]) -> Iterator[str]:
    changes = " ".join(found["overrides"])
    if found["fits"]:
        yield f"{'nearest':<{WIDTH}}{changes}"
        yield f"{'':<{WIDTH}}with that {found['needed_gib']:.2f} GiB are needed"
        return
    with_these = f" with {changes}" if changes else ""
    yield f"{'nearest':<{WIDTH}}nothing that was tried fits:{with_these} {found['needed_gib']:.2f} GiB are needed"
    if found["too_large"].startswith("encode"):
        yield f"{'':<{WIDTH}}for encoding alone: `lora-dpo cache … train.device=cpu` does that in the machine's memory"
