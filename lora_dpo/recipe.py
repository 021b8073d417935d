"""The recipe: every choice of a run as frozen, strict models, read from TOML.

Every problem is reported at once, with file and line, before any heavy import. `build.py` and `cli.py` alone see
these models; everything below takes plain arguments.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_dpo import recipe_toml
from lora_dpo.errors import UserError
from lora_dpo.recipe_checks import TINYWORLD, contradictions, may_be_hub_id
from lora_dpo.recipe_errors import Problem, RecipeError, shown, translate
from lora_dpo.recipe_methods import METHODS, REFUSED, Dpo
from lora_dpo.recipe_sections import CONTENT_KEYS, FREE_KEYS, KINDS, SECTIONS, Recipe
from lora_dpo.recipe_toml import Document, Key


def load(name: str, arguments: Sequence[str] = ()) -> Recipe:
    """A recipe by path or shipped name, with `section.key=value` arguments over it.

    Raises:
        UserError: no such recipe, malformed TOML, an argument that is not an override.
        RecipeError: everything wrong with keys and values, at once.
    """
    path = recipe_toml.find(name)
    document = recipe_toml.inherit(path, KINDS)
    document.values.setdefault("name", path.stem)
    if arguments:
        document = recipe_toml.merge(document, recipe_toml.overrides(arguments), KINDS)
    document.name = str(path)
    return validate(document)


def load_with_or_without_data(name: str, arguments: Sequence[str] = ()) -> tuple[Recipe, bool]:
    """As `load`, and whether there are data at all: that `data.path` is left out or doesn't exist is no error here."""
    try:
        return load(name, arguments), True
    except RecipeError as error:
        if {problem.key for problem in error.problems} != {("data", "path")}:
            raise
    return load(name, [*arguments, "data.path=."]), False


def validate(document: Document) -> Recipe:
    """The recipe of a document; relative input paths are taken from the file that sets them, and made absolute.

    Raises:
        RecipeError: everything wrong with keys and values, at once.
    """
    values = _with_absolute_inputs(document)
    problems: dict[Key, str] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            key, message = _translated(entry, values)
            problems.setdefault(key, message)
    problems = dict(contradictions(values, set(problems), _default)) | problems
    if problems or recipe is None:
        order = {key: n for n, key in enumerate(document.places)}
        keys = sorted(problems, key=lambda k: order.get(k, len(order)))
        raise RecipeError(document.name, [Problem(k, problems[k], document.place(k)) for k in keys])
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as TOML; `load` of it gives an equal recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def differences(held: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (in a run's recipe file, here) of all that differs, `output` and `FREE_KEYS` left out.

    Of a section of another kind, what both have. The file is only read: its paths may be gone, and an earlier version
    may have written it.

    Raises:
        UserError: it is no TOML.
    """
    try:
        written: dict[str, Any] = tomllib.loads(held.read_text("utf-8"))
    except (OSError, ValueError) as error:
        hint = "give another --run-dir, or start over with --fresh"
        raise UserError(f"can't be read ({error})", where=held, hint=hint) from error
    found = {}
    for section, here in recipe.model_dump(mode="json").items():
        there = written.get(section, {})
        if section == "output" or not isinstance(here, dict) or not isinstance(there, dict):
            continue
        other_kind = here.get("kind") != there.get("kind", here.get("kind"))
        for key in [key for key in here | there if not other_kind or (key in here and key in there)]:
            old = there[key] if key in there else _plain_default(section, key, there.get("kind"))
            if old != here.get(key) and f"{section}.{key}" not in FREE_KEYS:
                found[f"{section}.{key}"] = (old, here.get(key))
    return found


def resumes(key: str, recipe: Recipe) -> bool:
    """Whether a run may go on with this recipe where it differs in the key: what was trained stays as it is.

    Steps may be added where the learning rate doesn't depend on their number. Files may have moved: their content is
    compared with the checkpoint's.
    """
    added = key == "train.steps" and recipe.train.schedule == "constant"
    return added or key in CONTENT_KEYS or key.startswith("evaluate.")


def json_schema() -> dict[str, Any]:
    """JSON schema for editors; `extends` is part of the file, not of the resolved recipe."""
    schema = Recipe.model_json_schema()
    schema["title"] = "lora-dpo recipe"
    schema["properties"]["extends"] = {"type": "string", "description": "a recipe file or shipped name to start from"}
    # A file that extends another, or is completed on the command line, may leave out anything.
    for table in (schema, *schema["$defs"].values()):
        table.pop("required", None)
    schema["properties"]["method"] = {"anyOf": schema["properties"]["method"]["oneOf"]}
    return schema


def _with_absolute_inputs(document: Document) -> dict[str, Any]:
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in document.values.items()}
    for section, name in _INPUTS:
        table = values.get(section)
        value = table.get(name) if isinstance(table, dict) else None
        place = document.place((section, name))
        if not isinstance(table, dict) or not isinstance(value, str) or value == TINYWORLD or not value:
            continue
        folder = place.file.resolve().parent if place is not None and place.file is not None else Path.cwd()
        path = folder / Path(value).expanduser()
        if path.exists() or not (section == "base" and may_be_hub_id(value)):
            table[name] = str(path)
    return values


_INPUTS = (
    ("data", "path"), ("base", "model"), ("base", "vae"), ("base", "config"), ("adapter", "start"),
    ("evaluate", "prompts_file"),
)  # fmt: skip


def _default(section: str, name: str, kind: object) -> Any:
    """The default of a key, of its section's `kind` where that matters; KeyError if there is none."""
    model = METHODS[str(kind)] if section == "method" else SECTIONS[section]
    field = model.model_fields[name]
    if field.is_required():
        raise KeyError(name)
    return field.default


def _plain_default(section: str, name: str, kind: object) -> Any:
    """As JSON has it; None if there is none."""
    try:
        default = _default(section, name, kind)
    except KeyError:
        return None
    return list(default) if isinstance(default, tuple) else default


def _translated(entry: Any, values: dict[str, Any]) -> tuple[Key, str]:
    loc = list(entry["loc"])
    if loc[0] == "method" and len(loc) > 1 and loc[1] in METHODS:
        del loc[1]  # pydantic's mark of the union's branch
    if len(loc) > 2 and (expected := _UNIONS.get((loc[0], loc[1]))):
        return tuple(loc[:2]), f"got {shown(values[loc[0]][loc[1]])}, expected {expected}"
    kind = values["method"].get("kind") if isinstance(values.get("method"), dict) else None
    if entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        loc.append("kind")
        if isinstance(kind, str) and kind in REFUSED:
            return tuple(loc), REFUSED[kind]
    method = METHODS.get(kind) if isinstance(kind, str) else None
    known = {(section,): list(model.model_fields) for section, model in SECTIONS.items()}
    known |= {(): [*Recipe.model_fields, "extends"], ("method",): list((method or Dpo).model_fields)}
    if entry["type"] == "extra_forbidden" and loc[0] == "method" and method and len(loc) == 2:
        others = [k for k, model in METHODS.items() if loc[1] in model.model_fields]
        if others:
            return tuple(loc), f'method.kind = "{kind}" has no {loc[1]} (it belongs to {", ".join(others)})'
    about = {
        (section, name): field.description
        for section, model in SECTIONS.items()
        for name, field in model.model_fields.items()
        if field.description
    }
    return translate({**entry, "loc": loc}, known, about)


_UNIONS = {
    ("adapter", "targets"): (
        '"attention", "attention+ff" or "all-linear", each with "+conv" or without, or an array of module name endings'
    ),
    ("method", "beta"): 'a number above 0, or "auto"',
}
