"""What the documents say of recipes and commands is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from lora_dpo import cli, recipe, recipe_sections, recipe_toml

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SECTIONS = {name: [model] for name, model in recipe_sections.SECTIONS.items()} | {
    "method": list(recipe_sections.METHODS.values())
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def our_commands() -> list[tuple[Path, list[str]]]:
    """Every `lora-dpo …` in a shell block, as (document, arguments)."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, "sh"):
            for command in re.split(r"&&|\n", block):
                words = shlex.split(command, comments=True)
                if words and Path(words[0]).name == "lora-dpo":
                    found.append((path, words[1:]))
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_key_is_documented_and_no_other(section: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    part = text.split(f"\n## [{section}]\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", part, re.M))
    fields = {name: field for model in SECTIONS[section] for name, field in model.model_fields.items()}
    assert set(rows) == set(fields)
    for name, field in fields.items():
        if name == "kind" and section == "method":
            continue
        if field.is_required():
            assert rows[name] == "required", name
        elif field.default is not None and rows[name].startswith("`"):
            shown = tomllib.loads(f"value = {rows[name].strip('`')}")["value"]
            assert shown == field.default, name
        else:
            assert field.default is None, f"{name} has the default {field.default!r}"


@pytest.mark.parametrize(
    ("document", "arguments"),
    our_commands(),
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.name,
)
def test_documented_commands_parse(document: Path, arguments: list[str], monkeypatch) -> None:
    command = get_command(cli.app)
    words = list(arguments)
    while getattr(command, "commands", None):
        assert words[:1] in [[name] for name in command.commands], f"{document.name}: lora-dpo {' '.join(arguments)}"
        command = command.commands[words.pop(0)]
    if ">" in words:
        words = words[: words.index(">")]
    context = command.make_context("lora-dpo", words, resilient_parsing=False)
    if context.params.get("recipe"):
        # Files of the reader's, which are not here.
        overrides = [a for a in context.params.get("overrides") or [] if "=/" not in a]
        source = context.params["recipe"]
        if source in recipe_toml.shipped_names():
            recipe.load(source, [*overrides, *([] if source == "quickstart" else ["data.path=."])])


def test_the_test_command_stands_between_its_marks() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    part = text.split("<!-- tests -->")[1].split("<!-- /tests -->")[0]
    assert "-m pytest" in part
    assert "sh" in re.findall(r"^```(\w+)$", part, re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_python_examples_are_python_and_import_what_exists(path: Path) -> None:
    for block in blocks(path, "python") if path.name == "README.md" else []:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module or "", fromlist=[a.name for a in node.names])
                assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_toml_examples_parse(path: Path) -> None:
    for block in blocks(path, "toml"):
        assert tomllib.loads(block), block  # which raises for what is no TOML
