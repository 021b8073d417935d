"""Imports point one way, heavy libraries stay where they are needed, and files stay short."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_dpo"
FILES = sorted(PACKAGE.rglob("*.py"))

# The lines of docs/architecture.md, lowest first. A folder stands for all of its files, unless one is named apart.
LAYERS: list[set[str]] = [
    {"", "errors"},  # "" is lora_dpo/__init__.py
    {
        "atomic",
        "distributed",
        "ema",
        "file_digests",
        "ledger",
        "peak_memory",
        "randomness",
        "progress",
        "recipe_fields",
        "recipe_toml",
        "stopping",
        "units",
        "mapped_tensors",
        "watch",
    },
    {
        "buckets",
        "cache_table",
        "data_table",
        "doctor_table",
        "fake_device",
        "methods.losses",
        "metrics_file",
        "plan_table",
        "recipe_errors",
        "recipe_methods",
        "run_lock",
        "summary",
    },
    {"adapted_layers", "recipe_checks", "recipe_sections", "updates"},
    {"kohya_layout", "recipe", "tinyworld"},
    {"data", "families", "scorers", "adapters", "recompute"},
    {"cache_store"},
    {"cache_index", "cache_pictures", "cache_use"},
    {"cache_fill"},
    {"cache", "cache_files", "denoising", "reference_cache", "sampling"},
    {"methods", "evaluation", "tinyworld.preferences", "tinyworld.pretrain", "tinyworld.scoring"},
    {"checkpoint", "figures", "optimizers", "hub", "run_dir", "step", "trackers"},
    {"contact_sheet", "export", "report"},
    {"kohya", "sources", "start", "train"},
    {"parts"},
    {"completion", "inputs", "memory"},
    {"fitting", "plan_data"},
    {"build", "caching", "data_check", "doctor", "plan", "reexport"},
    {"data_commands", "recipe_commands", "tinyworld.commands"},
    {"cli"},
    {"__main__"},
]
OWNERS_OF_THE_RECIPE = {
    "build",
    "caching",
    "completion",
    "inputs",
    "cli",
    "data_check",
    "fitting",
    "memory",
    "parts",
    "plan",
    "plan_data",
    "recipe_commands",
    "reexport",
}
RECIPE = {
    "recipe", "recipe_toml", "recipe_errors", "recipe_checks", "recipe_fields", "recipe_methods", "recipe_sections"
}  # fmt: skip
# No heavy import, not even inside a function; `cli` reaches them through `build` when a command runs.
LIGHT = {
    "",
    "__main__",
    "buckets",
    "cache_table",
    "cli",
    "data_commands",
    "data_table",
    "doctor_table",
    "errors",
    "file_digests",
    "plan_table",
    "progress",
    "recipe_commands",
    "stopping",
    "summary",
    "tinyworld.commands",
    "units",
    *RECIPE,
}
HEAVY = {
    "torch", "diffusers", "transformers", "peft", "accelerate", "gradio", "datasets", "matplotlib", "pyarrow", "numpy",
    "PIL", "scipy", "bitsandbytes", "safetensors", "huggingface_hub",
}  # fmt: skip


def module_of(path: Path) -> str:
    """`lora_dpo/data/images.py` → `data.images`, `lora_dpo/data/__init__.py` → `data`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def layer_of(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for index, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names:
                return index
    raise AssertionError(f"{module} has no place in LAYERS and in docs/architecture.md")


def imports(path: Path, *, typing_only: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported at run time; `from a import b` gives a.b."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_only:
            skipped |= {id(inner) for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
                package = ["lora_dpo", *(part for part in package if part)]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def ours(path: Path) -> Iterator[tuple[str, int]]:
    """(module of ours, line) for every import of one."""
    for name, line in imports(path):
        head, _, rest = name.partition(".")
        if head != "lora_dpo":
            continue
        # `lora_dpo.errors.UserError` is the module `errors`; `lora_dpo.__version__` the package itself.
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        yield rest, line


def folder(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_strictly_lower_lines(module: str) -> None:
    for imported, line in ours(MODULES[module]):
        if imported == module or (folder(imported) == folder(module) and layer_of(imported) <= layer_of(module)):
            continue
        assert layer_of(imported) < layer_of(module), f"{module}:{line} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_the_recipe_stops_at_build(module: str) -> None:
    if module in OWNERS_OF_THE_RECIPE | RECIPE:
        return
    seen = [f"{module}:{line}" for imported, line in ours(MODULES[module]) if imported in RECIPE]
    assert seen == []


@pytest.mark.parametrize("module", sorted(LIGHT & set(MODULES)))
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = [f"{name} (line {line})" for name, line in imports(MODULES[module]) if name.partition(".")[0] in HEAVY]
    assert heavy == []


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("peft", {"adapted_layers", "adapters"}), ("gradio", set()), ("accelerate", {"distributed", "trackers"})],
)
def test_a_library_has_its_one_place(library: str, allowed: set[str]) -> None:
    users = {m for m, path in MODULES.items() for name, _ in imports(path) if name.partition(".")[0] == library}
    assert users <= allowed


def test_the_app_uses_the_package_and_the_package_imports_it_nowhere() -> None:
    importers = {m for m, path in MODULES.items() for name, _ in imports(path) if name.partition(".")[0] == "app"}
    assert importers == set()


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "app").rglob("*.py"))], ids=lambda p: p.name)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_left_open(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    assert not any(mark in text for mark in ("TODO", "FIXME", "raise NotImplementedError"))


def test_every_layer_names_what_exists() -> None:
    names = {name for layer in LAYERS for name in layer}
    assert names <= set(MODULES) | {folder(module) for module in MODULES}


def test_the_order_is_the_documents() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = text.split("## Direction of imports")[1].split("```")[1].removeprefix("text").replace("\n", " ")
    ranks = [[layer_of(name.strip()) if name.strip() != "losses" else layer_of("methods.losses")
              for name in group.split(",")] for group in block.split("→")]  # fmt: skip
    for higher, lower in itertools.pairwise(ranks):
        assert min(higher) > max(lower) or set(higher) & set(lower), (higher, lower)
