"""A page of pairs as they will be learned: the better picture on the left, in a frame of its own colour."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from lora_dpo import atomic
from lora_dpo.data import Preference
from lora_dpo.data.images import decode
from lora_dpo.figures import FAINT, INK, LINE, font, wrapped

COLUMNS, THUMBNAIL, GAP, MARGIN, FRAME = 4, 200, 10, 32, 5
WINNER, TIE = "#1a7f37", "#d97706"
CAPTION_LINES = 2


def save(pairs: Sequence[Preference], path: Path, title: str) -> None:
    """Writes a PNG with a cell for each pair: winner (green, left), loser (grey), both orange for a tie; its prompt.

    Raises:
        UserError: the file can't be written.
    """
    text, small, heading = font(15), font(13), font(24, bold=True)
    cell_w, cell_h = 2 * THUMBNAIL + GAP, THUMBNAIL + 24 + 20 * CAPTION_LINES
    columns = min(COLUMNS, len(pairs))
    width = 2 * MARGIN + max(columns * (cell_w + 2 * GAP) - 2 * GAP, 640)
    height = 2 * MARGIN + 64 + math.ceil(len(pairs) / columns) * (cell_h + 2 * GAP)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), wrapped(title, heading, width - 2 * MARGIN, 1)[0], INK, heading)
    key = "green, left: the better one · grey: the other · orange: a tie"
    draw.text((MARGIN, MARGIN + 34), key, FAINT, text)
    for number, pair in enumerate(pairs):
        left = MARGIN + number % columns * (cell_w + 2 * GAP)
        top = MARGIN + 64 + number // columns * (cell_h + 2 * GAP)
        tie = pair.label == 0.5
        for side, data in enumerate((pair.winner, pair.loser)):
            inside = (THUMBNAIL - 2 * FRAME, THUMBNAIL - 2 * FRAME)
            picture = ImageOps.contain(decode(data, pair.origin), inside, Image.Resampling.LANCZOS)
            x = left + side * (THUMBNAIL + GAP)
            colour = TIE if tie else (WINNER, LINE)[side]
            draw.rectangle((x, top, x + THUMBNAIL - 1, top + THUMBNAIL - 1), "#f6f8fa", colour, FRAME)
            page.paste(picture, (x + (THUMBNAIL - picture.width) // 2, top + (THUMBNAIL - picture.height) // 2))
        draw.text((left, top + THUMBNAIL + 4), wrapped(pair.origin, small, cell_w, 1)[0], FAINT, small)
        for line, words in enumerate(wrapped(pair.prompt, text, cell_w, CAPTION_LINES)):
            draw.text((left, top + THUMBNAIL + 22 + 20 * line), words, INK, text)
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    with atomic.clear_os_errors(path):
        atomic.replace(path, buffer.getvalue())
