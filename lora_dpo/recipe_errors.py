"""What is wrong with a recipe, all of it at once: pydantic's findings in the words of the recipe's author."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo.errors import UserError
from lora_dpo.recipe_toml import Key, Place


@dataclass(frozen=True)
class Problem:
    """One thing to correct: the key, what is wrong with it, and where it was set (None: nowhere, it is missing)."""

    key: Key
    message: str
    place: Place | None = None

    def __str__(self) -> str:
        text = f"{'.'.join(self.key)}: {self.message}"
        return f"{self.place} · {text}" if self.place else text

    def as_json(self) -> dict[str, Any]:
        place = self.place or Place(None)
        return {
            "key": ".".join(self.key),
            "message": self.message,
            "file": None if place.file is None else str(place.file),
            "line": place.line,
        }


class RecipeError(UserError):
    """A recipe that can't be used; `problems` lists everything found."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{count}{lines}", where=name)


def translate(
    error: Mapping[str, Any], known: Mapping[Key, Sequence[str]], descriptions: Mapping[Key, str]
) -> tuple[Key, str]:
    """One entry of `ValidationError.errors()` as (key, message).

    Args:
        error: pydantic's entry.
        known: the keys that each table has, by the table's path, for near misses.
        descriptions: what a key is for, told where it is missing.
    """
    key = tuple(str(part) for part in error["loc"])
    return key, "".join(_message(error, key, known, descriptions))


def _message(
    error: Mapping[str, Any], key: Key, known: Mapping[Key, Sequence[str]], descriptions: Mapping[Key, str]
) -> Iterator[str]:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        yield f"unknown {'table' if isinstance(error['input'], dict) else 'key'}{near_miss(key, known)}"
    elif kind == "missing":
        about = descriptions.get(key)
        yield f"this key is required: {about}" if about else "this key is required"
    elif kind == "union_tag_not_found":
        yield "kind is required"
    elif kind == "union_tag_invalid":
        yield f"got {shown(context['tag'])}, expected one of {context['expected_tags']}".replace("'", '"')
    elif kind == "value_error":
        yield str(context["error"])
    else:
        yield f"got {shown(error['input'])}, expected {_expectation(kind, context)}"


_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def _expectation(kind: str, context: Mapping[str, Any]) -> str:
    match kind:
        case "literal_error":
            return f"one of {context['expected']}".replace("'", '"')
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:g}"
        case "multiple_of":
            return f"a multiple of {context['multiple_of']:g}"
        case "string_too_short":
            return "some text"
        case "string_pattern_mismatch":
            return f"text like {context['pattern']}"
        case "too_short" | "too_long" | "missing_argument" | "unexpected_positional_argument":
            return "another number of entries"
        case _:
            return _TYPES.get(kind, f"another value ({kind})")


def shown(value: Any) -> str:
    """A value as the recipe's author wrote it, shortened."""
    text = "true" if value is True else "false" if value is False else f'"{value}"' if isinstance(value, str) else None
    text = repr(value) if text is None else text
    return text if len(text) <= 60 else f"{text[:57]}…"


def near_miss(key: Key, known: Mapping[Key, Sequence[str]]) -> str:
    """` (did you mean …?)` for a key in a known table; a key of another table is found there."""
    *table, name = key
    here = known.get(tuple(table), ())
    if near := difflib.get_close_matches(name, here, n=1):
        return f" (did you mean {near[0]}?)"
    elsewhere = [".".join([*path, name]) for path, names in known.items() if name in names and path != tuple(table)]
    if elsewhere:
        return f" (did you mean {elsewhere[0]}?)"
    return f" (known here: {', '.join(here)})" if here else ""
