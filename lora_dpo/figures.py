"""Two pictures of a run: base beside adapted, and the training curves. Both are drawn at twice README width."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.sampling import to_pil

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, LINE, BASE, ADAPTED, THIRD = "#1f2328", "#656d76", "#d0d7de", "#8c959f", "#4f46e5", "#d97706"
WIDTH, MARGIN, GAP, GUTTER, RADIUS = 1800, 48, 24, 56, 14
PER_BLOCK = 4


def before_after(
    base: Float[Tensor, "n 3 H W"],
    adapted: Float[Tensor, "n 3 H W"],
    prompts: Sequence[str],
    path: Path | str,
    *,
    n: int = 8,
    title: str = "Before and after",
    subtitle: str = "",
) -> Path:
    """A PNG grid, 1800 pixels wide: each prompt above its base image and, below that, its adapted image.

    Shows the first image of each of the first `n` distinct prompts: nothing is selected by looks or score.

    Raises:
        LoraDpoError: no images, or numbers that don't agree.
    """
    if not len(base) == len(adapted) == len(prompts) or not prompts:
        raise LoraDpoError(f"{len(base)} base and {len(adapted)} adapted images for {len(prompts)} prompts")
    rows = list({prompt: row for row, prompt in reversed(list(enumerate(prompts)))}.values())
    shown = sorted(rows)[:n]
    blocks = math.ceil(len(shown) / PER_BLOCK)
    columns = math.ceil(len(shown) / blocks)
    height, width = base.shape[-2:]
    # One column of few prompts needn't fill the page.
    tile_w = min(560, (WIDTH - 2 * MARGIN - GUTTER - (columns - 1) * GAP) // columns)
    tile_h = round(tile_w * height / width)
    caption, label, heading, small = font(25), font(26, bold=True), font(40, bold=True), font(25)
    captions = {row: wrapped(prompts[row], caption, tile_w) for row in shown}

    head = MARGIN + 52 + (40 if subtitle else 0) + 24
    line = 33
    texts = [max(len(captions[row]) for row in shown[b * columns : (b + 1) * columns]) for b in range(blocks)]
    tops = [head + sum(texts[:b]) * line + b * (2 * tile_h + GAP // 2 + 16 + 52) for b in range(blocks)]
    bottom = tops[-1] + texts[-1] * line + 16 + 2 * tile_h + GAP // 2 + MARGIN
    page = Image.new("RGB", (WIDTH, bottom), "white")
    draw = ImageDraw.Draw(page)
    left = (WIDTH - GUTTER - columns * tile_w - (columns - 1) * GAP) // 2
    draw.text((left + GUTTER, MARGIN - 8), title, font=heading, fill=INK)
    if subtitle:
        draw.text((left + GUTTER, MARGIN + 48), subtitle, font=small, fill=FAINT)
    for block, top in enumerate(tops):
        images_top = top + texts[block] * line + 16
        for side, (name, colour) in enumerate((("base", BASE), ("adapted", ADAPTED))):
            y = images_top + side * (tile_h + GAP // 2)
            _sideways(page, name, label, colour, (left + GUTTER // 2 - 8, y + tile_h // 2))
            for column, row in enumerate(shown[block * columns : (block + 1) * columns]):
                x = left + GUTTER + column * (tile_w + GAP)
                _tile(page, (base, adapted)[side][row], (x, y, tile_w, tile_h))
                if side == 0:
                    # The last line of every caption sits on its image.
                    start = images_top - 12 - len(captions[row]) * line
                    for number, words in enumerate(captions[row]):
                        draw.text((x + 2, start + number * line), words, font=caption, fill=INK)
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return _written(Path(path), buffer.getvalue())


def curves(metrics: Path | str, path: Path | str, *, title: str = "") -> Path:
    """Loss, implicit accuracy, margin, errors and learning rate over optimizer steps, raw and smoothed.

    Quantities a method doesn't log are left out.

    Args:
        metrics: a run's `metrics.jsonl`.

    Raises:
        UserError: no such file, or a line that is no JSON object with a step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = read_metrics(metrics)
    steps = [line["step"] for line in lines]
    names = {name for line in lines for name in line}
    columns = {name: [float(line.get(name, math.nan)) for line in lines] for name in names}
    panels = _panels(set(columns))
    if not panels:
        raise UserError("its lines have no loss or learning rate to draw", metrics)
    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.titley": 1.06, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": BASE, "axes.labelcolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
        "text.color": INK, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5, "legend.edgecolor": "none",
        "legend.framealpha": 0.75, "axes.formatter.limits": (-3, 4),
    }  # fmt: skip
    with pyplot.rc_context(style):
        across = min(3, len(panels))
        down = math.ceil(len(panels) / across)
        figure, grid = pyplot.subplots(
            down,
            across,
            figsize=(9, 0.4 + 2.75 * down),
            squeeze=False,
            sharex=True,
            layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06, hspace=0.05, wspace=0.03),
        )
        axes = list(grid.flat)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, steps, columns)
        for place, axis in enumerate(axes):
            if place >= len(panels):
                axis.set_axis_off()
            elif place + across >= len(panels):
                axis.tick_params(labelbottom=True)
                axis.set_xlabel("optimizer step")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200)
        pyplot.close(figure)
    return _written(Path(path), buffer.getvalue())


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that was cut off by a kill is left out.

    Raises:
        UserError: no such file, no lines, or a line that is no JSON object with a step.
    """
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", path) from error
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            values = json.loads(line)
            lines.append({"step": int(values["step"])} | values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a line of metrics ({error})", f"{path}:{number}") from error
    if not lines:
        raise UserError("no metrics yet", path, "train at least one step")
    return lines


@dataclass(frozen=True)
class _Series:
    name: str
    minus: str | None = None
    label: str = ""
    colour: str = ADAPTED


@dataclass(frozen=True)
class _Panel:
    """`level` is the value of a policy that is still the reference; `exact` values are not smoothed."""

    title: str
    unit: str
    series: tuple[_Series, ...]
    level: float | None = None
    level_label: str = ""
    exact: bool = False


def _panels(known: set[str]) -> list[_Panel]:
    pairwise = "margin" in known
    loss = _Panel("Loss", "−log σ(margin), nats", (_Series("loss"),), math.log(2), "ln 2")
    panels = [
        loss if pairwise else _Panel("Loss", "mean squared error", (_Series("loss"),)),
        _Panel("Implicit accuracy", "share of pairs", (_Series("implicit_accuracy"),), 0.5, "chance"),
        _Panel("Margin", "implicit reward difference, nats", (_Series("margin"),), 0.0),
        _Panel(
            "Error against the reference",
            "policy − reference, MSE",
            (
                _Series("error_winner", "ref_error_winner", "winner"),
                _Series("error_loser", "ref_error_loser", "loser", THIRD),
            ),
            0.0,
        ),
        _Panel(
            "Denoising error",
            "mean squared error",
            (
                _Series("error_winner", None, "winner, policy", "#a5b4fc"),
                _Series("error_loser", None, "loser, policy", "#fbbf6b"),
                _Series("ref_error_winner", None, "winner, reference", "#3730a3"),
                _Series("ref_error_loser", None, "loser, reference", "#92400e"),
            ),
        ),
        _Panel("Held-out accuracy", "share of pairs, fixed draws", (_Series("heldout_accuracy"),), 0.5, "chance"),
        _Panel("Held-out margin", "nats, fixed draws", (_Series("heldout_margin"),), 0.0),
        _Panel("Learning rate", "of the optimizer", (_Series("learning_rate", colour=INK),), exact=True),
    ]
    return [p for p in panels if all(s.name in known and (s.minus is None or s.minus in known) for s in p.series)]


def _draw(axis: Axes, panel: _Panel, steps: list[int], columns: Mapping[str, Sequence[float]]) -> None:
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    if panel.level is not None:
        axis.axhline(panel.level, color=BASE, linewidth=1, linestyle=(0, (4, 3)))
        if panel.level_label:
            axis.annotate(
                panel.level_label, (1, panel.level), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", va="bottom", color=FAINT, fontsize=8,
            )  # fmt: skip
    for series in panel.series:
        values = list(columns[series.name])
        if series.minus is not None:
            values = [value - other for value, other in zip(values, columns[series.minus], strict=True)]
        smooth = values if panel.exact else _smoothed(values)
        if series.name.startswith("heldout_"):  # measured now and then
            known = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
            axis.plot(*zip(*known, strict=True), "o-", color=series.colour, linewidth=1.6, markersize=3.5)
        elif len(values) == 1:
            axis.plot(steps, values, "o", color=series.colour, label=series.label)
        elif smooth == values:
            axis.plot(steps, values, color=series.colour, linewidth=1.6, label=series.label)
        else:
            if len(panel.series) < 4:
                axis.plot(steps, values, color=series.colour, linewidth=0.6, alpha=0.25)
            dashes = (0, (3, 2)) if series.name.startswith("ref_") else "solid"
            axis.plot(steps, smooth, color=series.colour, linewidth=1.6, linestyle=dashes, label=series.label)
    if any(series.label for series in panel.series):
        axis.legend(fontsize=7.5, handlelength=1.4, labelspacing=0.3, borderaxespad=0.2)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Two centred running means over a twentieth of the steps each, over what there is near the ends; NaN left out."""
    reach = len(values) // 40
    result = list(values)
    for _ in range(2 if reach else 0):
        windows = [
            [v for v in result[max(0, i - reach) : i + reach + 1] if not math.isnan(v)] for i in range(len(result))
        ]
        result = [math.fsum(window) / len(window) if window else math.nan for window in windows]
    return result


def _written(path: Path, data: bytes) -> Path:
    with atomic.clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(path, data)
    return path


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as it comes with matplotlib: the same picture on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 3) -> list[str]:
    """At most `lines` lines of at most `width` pixels; what is cut ends in an ellipsis."""
    words = [piece for word in text.split() for piece in _pieces(word, font, width)]
    rows: list[str] = [""]
    for word in words:
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    if len(rows) <= lines:
        return rows
    last = rows[lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*rows[: lines - 1], f"{last.rstrip()}…"]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word that is wider than the line (a URL, a script without spaces) is broken anywhere."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _tile(page: Image.Image, image: Tensor, box: tuple[int, int, int, int]) -> None:
    """The image in `box` (x, y, width, height) with round corners; small images are enlarged smoothly."""
    x, y, width, height = box
    scale = 4  # corners are drawn larger and reduced, which smooths them
    mask = Image.new("L", (width * scale, height * scale), 0)
    corners = (0, 0, width * scale - 1, height * scale - 1)
    ImageDraw.Draw(mask).rounded_rectangle(corners, RADIUS * scale, fill=255)
    picture = to_pil(image).resize((width, height), Image.Resampling.LANCZOS)
    page.paste(picture, (x, y), mask.resize((width, height), Image.Resampling.LANCZOS))


def _sideways(page: Image.Image, text: str, font: ImageFont.FreeTypeFont, colour: str, centre: tuple[int, int]) -> None:
    left, top, right, bottom = font.getbbox(text)
    label = Image.new("L", (round(right - left) + 8, round(bottom - top) + 8), 0)
    ImageDraw.Draw(label).text((4 - left, 4 - top), text, font=font, fill=255)
    label = label.rotate(90, expand=True)
    place = (centre[0] - label.width // 2, centre[1] - label.height // 2)
    page.paste(Image.new("RGB", label.size, colour), place, label)
