"""What a finished run says on the terminal: plain text from the content of `result.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def summary(result: Mapping[str, Any], run_dir: Path, *, already: bool = False, pushed: str | None = None) -> str:
    """The proof, where the adapter is, the lines that load it, and the next command to try."""
    return "\n".join(_lines(result, run_dir, already, pushed))


def load_lines(pipeline: str, base: str, options: Mapping[str, Any]) -> list[str]:
    """Python that loads the base as `pipe`; `base` is an expression, `options` what else the recipe says of it."""
    revision = f", revision={options['revision']!r}" if options.get("revision") else ""
    how = "from_single_file" if options.get("single_file") else "from_pretrained"
    lines = [f"pipe = {pipeline}.{how}({base}{revision})"]
    if predicted := options.get("prediction_type"):
        settings = f"pipe.scheduler.config, prediction_type={predicted!r}"
        lines.append(f"pipe.scheduler = type(pipe.scheduler).from_config({settings})")
    return lines


def _lines(result: Mapping[str, Any], run_dir: Path, already: bool, pushed: str | None) -> Iterator[str]:
    state = "is finished already" if already else "is finished"
    yield f"{result['name']} {state}: {result['steps']} steps on {result['pairs']} pairs, {_time(result['seconds'])}"
    yield ""
    if "comparison" in result:
        prompts = result["comparison"]["prompts"]
        yield from _table(f"{prompts} held-out prompts, same seeds", result["comparison"], result["categories"])
        yield ""
    if implicit := result["implicit"]:
        interval = _interval(implicit["accuracy_ci95"])
        pairs = implicit["pairs"]
        yield f"implicit accuracy on {pairs} held-out pairs: {implicit['accuracy']:.3f}{interval}"
        if measured := result.get("held_out_by_step"):
            yield f"while training, on a part of them: {_course(measured)}"
        yield ""
    adapter = run_dir / result["adapter"]
    yield f"adapter   {adapter}"
    if result.get("adapter_kohya"):
        yield f"          {run_dir / result['adapter_kohya']}  for ComfyUI, A1111, Forge"
    yield f"report    {run_dir / 'README.md'}"
    if pushed is not None:
        yield f"hub       {pushed}"
    yield ""
    kind = result["pipeline"]
    first, *others = load_lines(kind, repr(result["base"]), result.get("base_options", {}))
    yield f"load it   {first}"
    yield from (f"          {line}" for line in others)
    yield f"          pipe.load_lora_weights({str(adapter.parent)!r})"
    yield f"          image = pipe({result['example_prompt']!r}).images[0]"
    yield ""
    yield f"try next  lora-dpo app --run {run_dir}"


def _course(measured: Sequence[Mapping[str, float]]) -> str:
    """The first, the best and the last of what was measured."""
    best = max(measured, key=lambda one: (one["accuracy"], one["margin"], -one["step"]))
    named = {measured[0]["step"]: "", best["step"]: "best "} | {measured[-1]["step"]: "last "}
    if best is measured[-1]:
        named[best["step"]] = "best "
    steps = {one["step"]: one["accuracy"] for one in measured}
    return ", ".join(f"{named[step]}{steps[step]:.3f} at step {step}" for step in sorted(named))


def _table(title: str, overall: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    rows = [("score", overall), *((f"  {name}", part) for name, part in parts.items())]
    width = max(len(title), *(len(name) for name, _ in rows))
    yield f"{title:<{width}}  {'base':>6}  {'adapted':>7}  {'difference [95 %]':<24}  {'win rate [95 %]':<22}"
    for name, row in rows:
        difference = f"{row['effect']['mean']:+.3f}{_interval(row['effect']['ci95'], '+')}"
        rate = f"{row['win_rate']:.3f}{_interval(row['ci95'])}"
        yield f"{name:<{width}}  {row['mean_b']:>6.3f}  {row['mean_a']:>7.3f}  {difference:<24}  {rate}".rstrip()


def _interval(bounds: list[float | None], sign: str = "") -> str:
    low, high = bounds
    return "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
