"""Recipe files as plain documents: finding them, reading them with the line of every key, inheriting, overriding.

Nothing here knows which keys a recipe has; `recipe.py` does.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_dpo.errors import UserError

Key = tuple[str, ...]
# section → kind → the keys that this kind has: a layer that changes the kind drops inherited keys of the old one.
Kinds = Mapping[str, Mapping[str, frozenset[str]]]


@dataclass(frozen=True)
class Place:
    """Where a key was set: a file and its line, or the command line."""

    file: Path | None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return "command line"
        return str(self.file) if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Document:
    """Values of a recipe with the place that set each leaf key; later layers win."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)

    def place(self, key: Key) -> Place | None:
        """The place of `key`, else of the nearest table or array around it, else None."""
        return next((self.places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.places), None)


def shipped_folder() -> Path:
    """The recipes that come with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_names() -> list[str]:
    """Names as `lora-dpo train` takes them: paths below the folder without `.toml`, sorted."""
    folder = shipped_folder()
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.toml"))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe given by path (relative to `beside` or the working directory) or by a shipped name.

    Raises:
        UserError: neither a file nor a shipped recipe.
    """
    path = Path(name).expanduser()
    path = path if beside is None or path.is_absolute() else beside / path
    if path.is_file():
        return path
    names = shipped_names()
    bare = name.removesuffix(".toml")
    if bare in names:
        return shipped_folder() / f"{bare}.toml"
    near = difflib.get_close_matches(Path(bare).name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    if path.is_dir():
        raise UserError("this is a folder, not a recipe", where=path, hint="give a .toml file")
    raise UserError("no such recipe", where=name, hint=f"{hint}shipped recipes: {', '.join(names) or 'none'}")


def read(path: Path) -> Document:
    """Parses one file, without what it extends.

    Raises:
        UserError: unreadable, not UTF-8, or malformed TOML (with its line).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=path, hint="save the recipe as UTF-8") from None
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", where=path) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        line = re.search(r"\(at line (\d+), column \d+\)", message)
        last_line = len(text.splitlines())
        where = Place(path, int(line[1]) if line else last_line)
        what = re.sub(r"\s*\(at .*\)$", "", message)
        hint = 'a text value needs quotes: key = "text"' if "Invalid value" in what else None
        raise UserError(f"malformed TOML: {what[:1].lower()}{what[1:]}", where=where, hint=hint) from None
    places = {key: Place(path, line) for key, line in key_lines(text)}
    return Document(str(path), values, places)


def key_lines(text: str) -> Iterator[tuple[Key, int]]:
    """Every table and key of valid TOML text with the 1-based line it starts on.

    `tomllib` reports no lines, so the text is cut into statements: each is the shortest run of lines that parses.
    """
    header: Key = ()
    chunk: list[str] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        chunk.append(line)
        try:
            statement = tomllib.loads("".join(chunk))
        except tomllib.TOMLDecodeError:
            continue
        start, is_header = number - len(chunk) + 1, chunk[0].lstrip().startswith("[")
        chunk = []
        if is_header:
            header = tuple(_path_of_header(statement))
            yield header, start
        else:
            for key in _keys(statement):
                yield header + key, start


def _path_of_header(table: Any) -> Iterator[str]:
    while table:
        if isinstance(table, list):
            table = table[0]
            continue
        name, table = next(iter(table.items()))
        yield name


def _keys(table: Mapping[str, Any]) -> Iterator[Key]:
    for name, value in table.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *key) for key in _keys(value))


def inherit(path: Path, kinds: Kinds, seen: Sequence[Path] = ()) -> Document:
    """A file over everything it extends, outermost last.

    Raises:
        UserError: a cycle, or an `extends` that is not text or names no recipe.
    """
    if path.resolve() in seen:
        chain = " → ".join(str(p) for p in [*seen, path.resolve()])
        raise UserError(f"a recipe extends itself: {chain}", where=path, hint="break the cycle")
    document = read(path)
    parent = document.values.pop("extends", None)
    if parent is None:
        return document
    place = document.places.pop(("extends",), Place(path))
    if not isinstance(parent, str):
        raise UserError(f"extends: got {parent!r}, expected a file or recipe name in quotes", where=place)
    try:
        found = find(parent, beside=path.parent)
    except UserError as error:
        raise UserError(f'extends = "{parent}": {error.what}', where=place, hint=error.hint) from None
    base = inherit(found, kinds, [*seen, path.resolve()])
    return merge(base, document, kinds)


def merge(base: Document, layer: Document, kinds: Kinds) -> Document:
    """`layer` over `base`, table by table; arrays and scalars are replaced whole.

    A layer that changes a section's `kind` drops the inherited keys that only the old kind has; keys that the layer
    sets itself are never dropped, so that a contradiction inside one layer is still reported.
    """
    values, places = _copy(base.values), dict(base.places)
    for section, of_kind in kinds.items():
        old, new = values.get(section), layer.values.get(section)
        if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) != old.get("kind"):
            known_to_new = of_kind.get(str(new["kind"]), frozenset(old))
            known_to_old = of_kind.get(str(old.get("kind")), frozenset())
            for name in [n for n in old if n in known_to_old and n not in known_to_new]:
                del old[name]
                places = {key: place for key, place in places.items() if key[:2] != (section, name)}
    _update(values, layer.values)
    return Document(layer.name, values, places | layer.places)


def _update(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _update(into[name], value)
        else:
            into[name] = _copy(value)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(v) for name, v in value.items()}
    return list(value) if isinstance(value, list) else value


def overrides(arguments: Sequence[str]) -> Document:
    """`section.key=value` arguments as a layer; values are TOML, and a bare word is text.

    Raises:
        UserError: an argument without `=` or with an empty key.
    """
    document = Document("command line")
    for argument in arguments:
        name, equals, text = argument.partition("=")
        key = tuple(part.strip() for part in name.split("."))
        if not equals or not all(key):
            raise UserError(
                f"{argument!r} is not section.key=value", where="command line", hint="for instance train.steps=300"
            )
        _update(document.values, _nested(key, _value(text.strip())))
        document.places[key] = Place(None)
    return document


def _nested(key: Key, value: Any) -> dict[str, Any]:
    for name in reversed(key):
        value = {name: value}
    return value


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
