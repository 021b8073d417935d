"""Pictures and captions in files of their own: paths stay inside the data directory, and a bad one costs its row."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

MAX_PICTURE_BYTES = 1 << 30
MAX_CAPTION_BYTES = 1 << 16
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class BadRow(Exception):
    """Why a row can't be used: (reason, detail)."""


def shown(value: Any) -> str:
    """`repr`, cut short: what a hostile file holds may be of any size and depth."""
    return _SHORT.repr(value)


class DataDirectory:
    """The directory that paths are relative to and may not leave, by `..`, as absolute ones, or over a link."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def inside(self, name: Any) -> Path:
        """The file of that name; BadRow where there is none inside."""
        if not isinstance(name, str) or not name:
            raise BadRow("missing image", f"expected a path, got {shown(name)}")
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise BadRow("image outside the folder", shown(name))
            if not path.is_file():
                raise BadRow("missing image", f"no file {shown(name)}")
        except (OSError, ValueError, RuntimeError) as error:
            raise BadRow("missing image", f"{shown(name)}: {error}") from error
        return path

    def read(self, name: Any) -> bytes:
        """The bytes of a picture; BadRow as `inside`."""
        path = self.inside(name)
        try:
            if (size := path.stat().st_size) > MAX_PICTURE_BYTES:
                raise BadRow("undecodable image", f"{shown(name)} has {size:,} bytes")
            return path.read_bytes()
        except OSError as error:
            raise BadRow("missing image", f"{shown(name)}: {error.strerror}") from error

    def caption(self, name: str) -> str:
        """The text of a caption file without the white space around it; BadRow as `inside`, and if it isn't UTF-8."""
        path = self.inside(name)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_CAPTION_BYTES + 1)
        except OSError as error:
            raise BadRow("missing caption", f"{shown(name)}: {error.strerror}") from error
        if len(data) > MAX_CAPTION_BYTES:
            raise BadRow("caption too long", f"{shown(name)} has more than {MAX_CAPTION_BYTES:,} bytes")
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise BadRow("caption is not UTF-8", f"{shown(name)}: {error.reason}") from error


def prompt_of(value: Any) -> str:
    """A row's caption; BadRow if it is no text."""
    if isinstance(value, bytes):
        raise BadRow("caption is not UTF-8", shown(value))
    if not isinstance(value, str):
        raise BadRow("missing caption", f"prompt is {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("caption is not UTF-8", error.reason) from error
    return value
