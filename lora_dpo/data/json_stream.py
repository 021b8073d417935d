"""The values of a JSON array one after another, however long it is; a broken one costs itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_dpo.data.picture_files import BadRow
from lora_dpo.errors import UserError

# A value is held with at least so many characters after its beginning; one that isn't over by then is broken.
AHEAD = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_NEXT = re.compile(r"\}\s*,\s*(?=\{)|\}\s*\n\s*(?=\{)")


def values(path: Path) -> Iterator[Any]:
    """The elements of the file's array, or its values one after another (JSON lines); BadRow in place of a broken one.

    After a broken object reading goes on where the next one seems to begin. Bytes that aren't UTF-8 become surrogates.

    Raises:
        UserError: the file can't be read.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text, place, more = file.read(AHEAD), 0, True
            place = _BETWEEN.match(text).end()  # type: ignore[union-attr]  # it matches nothing too
            if text.startswith("[", place):
                place += 1
            while True:
                if more and len(text) - place < AHEAD:
                    added = file.read(AHEAD)
                    text, place, more = text[place:] + added, 0, bool(added)
                    continue
                place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
                if more and len(text) - place < AHEAD:
                    continue
                if place == len(text) or text[place] == "]":
                    return
                try:
                    value, place = decoder.raw_decode(text, place)
                    yield value
                except (ValueError, RecursionError) as error:
                    yield BadRow("not JSON", str(error))
                    found = _NEXT.search(text, place + 1)
                    while found is None and more:
                        text, place = text[-AHEAD // 2 :] + (added := file.read(AHEAD)), 0
                        more, found = bool(added), _NEXT.search(text)
                    if found is None:
                        return
                    place = found.end()
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", path) from error
