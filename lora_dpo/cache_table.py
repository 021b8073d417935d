"""What `lora-dpo cache` did and found, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_dpo.units import byte_size


def text(document: Mapping[str, Any]) -> str:
    """Lines from the command's JSON document."""
    return "\n".join(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield f"cache     {document['directory']}"
    if "filled" in document:
        yield from _filled(document["filled"])
    if "verified" in document:
        yield from _verified(document["verified"])
    if "pruned" in document:
        yield from _pruned(document["pruned"])
    if "stats" in document:
        yield from _stats(document["stats"])


def _filled(filled: Mapping[str, Any]) -> Iterator[str]:
    for name, part in filled["pairs"].items():
        made = part["encoded"]
        new = f"{made['pictures']:,} pictures and {made['prompts']:,} prompts encoded" if any(made.values()) else ""
        yield (
            f"{name:<9} {part['pairs']:,} pairs, {part['prompts']:,} prompts, {_plural(part['shards'], 'shard')} of "
            f"{byte_size(part['bytes'])}; {new or 'nothing was missing'}"
        )
    yield f"filled    in {filled['seconds']:.1f} s: training encodes nothing now"


def _verified(found: Mapping[str, Any]) -> Iterator[str]:
    count = len(found["damaged"])
    yield f"verified  every row of {_plural(found['shards'], 'shard')}, {byte_size(found['bytes'])}: " + (
        f"{_plural(count, 'file')} damaged, encoded again" if count else "all sound"
    )
    yield from (f"          {damage['file']}: {damage['reason']}" for damage in found["damaged"])


def _pruned(found: Mapping[str, Any]) -> Iterator[str]:
    what = f"{_plural(found['files'], 'file')}, {byte_size(found['bytes'])}"
    yield f"pruned    {what} freed" if found["deleted"] else f"prune     {what} would be freed"
    for reason, part in found["reasons"].items():
        yield f"          {reason}: {_plural(part['files'], 'file')}, {byte_size(part['bytes'])}"
    yield from (f"          {_pairs(pairs)}" for pairs in found["pairs"])
    if found["kept_bytes"]:
        yield f"          {byte_size(found['kept_bytes'])} kept for fills that go on or were interrupted"
    yield from (f"          {path} can't be deleted" for path in found.get("failed", []))
    if not found["deleted"]:
        yield "          nothing is deleted yet: add --yes"


def _stats(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"          {byte_size(found['bytes'])} in it, {byte_size(found['free_bytes'])} free on the disk"
    yield ""
    yield from _table(
        ("group", "made by", "rows", "of this recipe", "shards", "size", "last use"),
        [
            (
                group["name"],
                _made_by(group["about"]),
                f"{group['rows']:,}",
                f"{group['rows_of_this_recipe']:,}",
                f"{group['shards']:,}" + (f" ({group['damaged_shards']} damaged)" if group["damaged_shards"] else ""),
                byte_size(group["bytes"]),
                _last_use(group),
            )
            for group in found["groups"]
        ],
    )
    yield ""
    yield from (_pairs(pairs) for pairs in found["pairs"])
    yield from (_references(references) for references in found["references"])
    missing = [name for name, file in found["this_recipe"].items() if file is None]
    if missing:
        yield f"not yet encoded of this recipe: {', '.join(missing)}"
    if found["prunable_files"]:
        yield f"--prune would free {byte_size(found['prunable_bytes'])} in {_plural(found['prunable_files'], 'file')}"
    if found["unfinished_bytes"]:
        yield f"{byte_size(found['unfinished_bytes'])} belong to fills that go on or were interrupted"


def _pairs(pairs: Mapping[str, Any]) -> str:
    count = f"{pairs['pairs']:,} pairs" if pairs["pairs"] is not None else "not finished, or unreadable"
    mine = ", this recipe's" if pairs["this_recipe"] else ""
    return f"{pairs['name'].removesuffix('.safetensors')}  {pairs['about']}: {count}{mine}, {_last_use(pairs)}"


def _references(references: Mapping[str, Any]) -> str:
    about = references["about"]
    made_by = f"of unet {about['denoiser'][:8]}, {about['precision']}, seed {about['seed']}" if about else "unreadable"
    visits = _plural(references["visits"], "visit")
    return f"{references['name']}  reference errors {made_by}: {visits}, {byte_size(references['bytes'])}"


def _made_by(about: Mapping[str, Any]) -> str:
    size = about.get("size")
    return " ".join(
        str(part)
        for part in (
            about.get("family"),
            f"{size[1]}×{size[0]}" if size else None,
            about["crop"] if about.get("crop", "center") != "center" else None,
            f"vae {about['vae'][:8]}" if "vae" in about else None,
            f"text {about['text_encoders'][:8]}" if "text_encoders" in about else None,
        )
        if part
    )


def _last_use(found: Mapping[str, Any]) -> str:
    if found["in_use"]:
        return "in use now"
    return f"last used {found['last_use'][:16].replace('T', ' ')}" if found["last_use"] else "never used"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
