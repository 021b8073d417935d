"""The model card of a run: a README.md that the Hugging Face hub understands and a person can check."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_dpo.data import SourceReport
from lora_dpo.summary import load_lines

TINYWORLD = "tinyworld"
WEIGHTS = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
METHODS = {
    "dpo": "[Diffusion-DPO](https://arxiv.org/abs/2311.12908)",
    "ipo": "[IPO](https://arxiv.org/abs/2310.12036) on diffusion models",
    "hinge": "Diffusion-DPO with the hinge loss of [SLiC](https://arxiv.org/abs/2305.10425)",
    "dmpo": "[DMPO](https://arxiv.org/abs/2507.07510)",
    "kto": "[Diffusion-KTO](https://arxiv.org/abs/2404.04465)",
    "mapo": "[MaPO](https://arxiv.org/abs/2406.06424)",
    "dspo": "DSPO (direct score preference optimization)",
    "sft": "supervised fine-tuning on the preferred images",
}


def model_card(
    result: Mapping[str, Any],
    *,
    base_model: str,
    data_source: str,
    data_report: SourceReport,
    method: Mapping[str, Any],
    settings: Mapping[str, Any],
    sum_form_beta: float | None = None,
    resolution: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    repo: str | None = None,
    license: str | None = None,
    grid: str | None = "before_after.png",
    curves: str | None = "curves.png",
) -> str:
    """Markdown with YAML front matter. Local folders are named by their last part only: the card may be published.

    Args:
        result: the content of `result.json`.
        base_model: a hub id, a folder, or "tinyworld".
        data_source: what the pairs were read from, as in the recipe.
        data_report: rows, kept and dropped by reason.
        method: its keys in the recipe, `kind` among them.
        settings: adapter and training keys, as they should be listed.
        sum_form_beta: β / (2·c·h·w), which is comparable across latent sizes.
        sampling: steps, guidance and the like of the images behind the numbers.
        repo: the hub repository that the weights lie in; None: the run directory, weights in `adapter/`.
        license: an identifier for the front matter; by default none is claimed.
        grid, curves: pictures beside the card; None leaves them out.
    """
    parts = [
        _front_matter(base_model, method["kind"], license),
        f"# {_line(result['name'])}",
        f"A LoRA adapter for {_named(base_model)}, trained with {METHODS.get(method['kind'], method['kind'])} on "
        f"{data_report.kept:,} preference pairs by lora-dpo.",
        *([f"![The same prompts and seeds without and with the adapter]({grid})"] if grid else []),
        "## Load it",
        _snippet(result, base_model, repo, sampling or {}),
        "## Results",
        *_results(result, sampling or {}),
        "## Training data",
        _data(data_source, data_report, result.get("data", {})),
        "## Method",
        *_start(result),
        _method(result, method, settings, sum_form_beta, resolution),
        *([f"![Training curves]({curves})"] if curves else []),
        "## Limitations and licence",
        _limits(base_model, license),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base_model: str, kind: str, license: str | None) -> str:
    lines = ["---"]
    if _on_hub(base_model):
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: adapter"]
    if license is not None:
        lines.append(f"license: {json.dumps(license)}")
    tags = ["text-to-image", "lora", "diffusion-dpo" if kind == "dpo" else f"diffusion-{kind}", "lora-dpo"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", *(f"  - {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _snippet(result: Mapping[str, Any], base_model: str, repo: str | None, sampling: Mapping[str, Any]) -> str:
    pipeline, extra = result["pipeline"], ""
    if _on_hub(base_model):
        base = json.dumps(base_model)
    elif base_model == TINYWORLD:
        base, extra = "tinyworld.base_path()", "from lora_dpo import tinyworld\n"
    else:
        base = json.dumps(f"path/to/{_name(base_model)}")
    place = json.dumps(repo if repo is not None else "adapter")
    options = "".join(
        f", {theirs}={sampling[ours]!r}"
        for ours, theirs in (("steps", "num_inference_steps"), ("guidance", "guidance_scale"))
        if ours in sampling
    )
    loading = "".join(f"{line}\n" for line in load_lines(pipeline, base, result.get("base_options", {})))
    notes = [] if repo is not None else ["`adapter` is the folder beside this file."]
    if second := result.get("adapter_kohya"):
        notes.append(f"For ComfyUI, A1111 and Forge, put `{second}` into their LoRA folder: the same adapter.")
    note = "".join(f"\n\n{line}" for line in notes)
    return (
        f"```python\nfrom diffusers import {pipeline}\n{extra}\n"
        f"{loading}"
        f'pipe.load_lora_weights({place}, weight_name="{WEIGHTS}")\n'
        f"image = pipe({json.dumps(result['example_prompt'], ensure_ascii=False)}{options}).images[0]\n```{note}"
    )


def _results(result: Mapping[str, Any], sampling: Mapping[str, Any]) -> Iterator[str]:
    comparison = result.get("comparison")
    if comparison:
        how = ", ".join(f"{key} {value}" for key, value in sampling.items())
        yield (
            f"{comparison['n']} images per side for {comparison['prompts']} evaluation prompts, from the same seeds "
            f"with and without the adapter{f' ({how})' if how else ''}, scored by `{result['scorer']}`. "
            "Ties count half; intervals are 95 %, over prompts; p is an exact sign test"
            + (", for the parts corrected after Holm." if result.get("categories") else ".")
        )
        yield _table(comparison, result.get("categories") or {})
        yield _verdict(comparison, result.get("categories") or {})
    else:
        yield "No scorer was chosen, so there is no win rate. Judge by the pictures."
    if implicit := result.get("implicit"):
        yield (
            f"Read as a classifier of {implicit['pairs']} held-out pairs, the adapter prefers the preferred image in "
            f"{implicit['accuracy']:.3f}{_interval(implicit['accuracy_ci95'])} of them (margin "
            f"{implicit['margin']:+.3f}{_interval(implicit['margin_ci95'], '+')}, {implicit['draws']} draws each). "
            "This says that the objective generalises, and nothing about how good the pictures are."
        )


def _table(overall: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| score | base | adapted | difference [95 %] | win rate [95 %] | won / tied / lost | p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in (("**overall**", overall), *parts.items()):
        p = row["p_value"] if row.get("p_holm") is None else row["p_holm"]
        lines.append(
            f"| {_line(name)} | {row['mean_b']:.3f} | {row['mean_a']:.3f} "
            f"| {row['effect']['mean']:+.3f}{_interval(row['effect']['ci95'], '+')} "
            f"| {row['win_rate']:.3f}{_interval(row['ci95'])} "
            f"| {row['wins']} / {row['ties']} / {row['losses']} | {p:.2g} |"
        )
    return "\n".join(lines)


def _verdict(overall: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    low, high = overall["ci95"]
    if low > 0.5:
        text = "The adapted model scores higher than its base."
    elif high < 0.5:
        text = "**The adapted model scores lower than its base.**"
    else:
        more = overall["further_prompts"]
        text = "The two can't be told apart with so few prompts" + (
            f"; at this win rate about {more:,} more would be needed." if more else "."
        )
    worse = [name for name, row in parts.items() if (row["p_holm"] or 0) < 0.05 and row["effect"]["mean"] < 0]
    if worse:
        text += f" **Worse than the base: {', '.join(_line(name) for name in worse)}.**"
    return text


def cut_captions(cut: int, captions: int) -> str:
    """The sentence about captions that are longer than the text encoder's window."""
    return f"{cut:,} of {captions:,} captions are longer than the text encoder reads: the ends of them are cut off."


def _data(source: str, report: SourceReport, counted: Mapping[str, Any]) -> str:
    shown = "the tiny world's embedded pairs" if source == TINYWORLD else f"`{_name(source)}`"
    text = f"From {shown}: {report.rows:,} comparisons, of which {report.kept:,} were used"
    dropped = [f"{count:,} {_line(reason)}" for reason, count in report.dropped.most_common()]
    text = f"{text}; left out: {', '.join(dropped)}." if dropped else f"{text}."
    cut = counted.get("captions_cut")
    return f"{text} {cut_captions(cut, counted['captions'])}" if cut else text


def _start(result: Mapping[str, Any]) -> Iterator[str]:
    if start := result.get("start"):
        near = (
            "and stays near it: it is the reference of the objective and of the held-out pairs' margin, while win "
            "rates compare with the base model"
            if result.get("reference") == "adapter"
            else "while its reference is the base model"
        )
        yield f"Training starts from an adapter (`{_name(start['path'])}`, SHA-256 `{start['sha256']}`) {near}."


def _method(
    result: Mapping[str, Any],
    method: Mapping[str, Any],
    settings: Mapping[str, Any],
    sum_form_beta: float | None,
    resolution: int | None,
) -> str:
    rows: dict[str, Any] = {"method": method["kind"]}
    for key, value in method.items():
        if key == "beta":
            rows["β (mean-reduced errors, factor ½)"] = _value(value)
            if sum_form_beta is not None:
                rows["β of summed errors, β / (2·c·h·w)"] = f"{sum_form_beta:.4g}"
        elif key != "kind" and value is not None:
            rows[key.replace("_", " ")] = value
    rows |= {key.replace("_", " "): value for key, value in settings.items() if value is not None}
    if resolution is not None:
        count = len(result.get("buckets", ()))
        rows["resolution"] = f"{resolution} px" + (f", {count} aspect-ratio buckets" if count > 1 else "")
    rows["time"] = f"{result['train_seconds']:,.0f} s of training on {result['device']}"
    phases = ", ".join(f"{phase} {gib:.2f}" for phase, gib in result.get("peak_memory_gib_of", {}).items())
    rows["peak memory"] = f"{result['peak_memory_gib']:.2f} GiB" + (f" ({phases})" if phases else "")
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = ["| setting | value |", "|---|---|", *(f"| {_line(k)} | {_line(_value(v))} |" for k, v in rows.items())]
    return "\n".join(lines)


def _limits(base_model: str, license: str | None) -> str:
    terms = (
        "This adapter is of no use without its base model and inherits the terms under which that is licensed"
        if license is None
        else f"The adapter is licensed as `{license}`; the terms of its base model hold beside that"
    )
    return (
        f"{terms}, as well as its biases, with those of the people (or the rule) whose preferences it learned. "
        "Preference training raises what the labels reward and can lower what they don't: look at every row of the "
        f"table and at the pictures. The numbers hold for {_named(base_model)} with the sampler settings above."
    )


def _on_hub(base_model: str) -> bool:
    return HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()


def _named(base_model: str) -> str:
    if _on_hub(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return "lora-dpo's embedded tiny world" if base_model == TINYWORLD else f"`{_name(base_model)}`"


def _name(path: str) -> str:
    return Path(path).name or path


def _interval(bounds: list[float | None], sign: str = "") -> str:
    low, high = bounds
    return "" if low is None or high is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    """One line that a Markdown table can hold."""
    return " ".join(text.split()).replace("|", "\\|")
