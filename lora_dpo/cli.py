"""The command line: `lora-dpo train RECIPE` and its neighbours.

Exit codes: 0 done, 2 the user's input, 1 anything else, 130 interrupted by Ctrl-C, 143 by SIGTERM. Nothing heavy is
imported before a command needs it, so that help and recipe errors answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lora_dpo import __version__
from lora_dpo.data_commands import group as data
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.recipe_commands import group as recipes
from lora_dpo.stopping import at_once, stoppable
from lora_dpo.tinyworld.commands import group as tinyworld

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align diffusion models to preferences with Diffusion-DPO, training LoRA adapters only.",
    epilog="Start here: lora-dpo train quickstart",
)
app.add_typer(data, name="data")
app.add_typer(recipes, name="recipes")
app.add_typer(tinyworld, name="tinyworld")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file or a shipped recipe's name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Replace single keys, as TOML.")
]
APP = "lora_dpo_app"


class Resume(Enum):
    """Of a run that is in the folder."""

    auto = "auto"
    never = "never"


Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else there.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits; every failure becomes a readable line and an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # --debug and --json are understood anywhere before a bare `--`.
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # Of torchvision and of kernels from the hub, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug, as_json = "--debug" in options, "--json" in options
    rest = [a for n, a in enumerate(arguments) if not (a == "--debug" and n < len(options))]
    received = int
    try:
        with at_once(), stoppable() as received:
            app(rest, prog_name="lora-dpo")
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, SystemExit) and error.code != 130:
            raise
        _fail("interrupted; the same command resumes where it can", 128 + (received() or signal.SIGINT), as_json)
    except Exception as error:
        if debug:
            raise
        _fail(*explain(error), as_json=as_json, error=error)
    sys.exit(0)


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code of a failure; the operating system's refusals are found under other errors too."""
    if isinstance(error, LoraDpoError):
        return str(error), error.exit_code
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        where = f"{cause.filename}: " if isinstance(cause, OSError) and cause.filename else ""
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
            return f"{where}no space left on the disk\n  → free some; the same command resumes the run", 1
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{where}permission denied\n  → choose another --run-dir, or change the permissions", 1
        if type(cause).__name__ == "OutOfMemoryError" or isinstance(cause, MemoryError):
            hint = (
                "lower train.micro_batch_pairs or evaluate.batch, or set train.gradient_checkpointing=full, and then "
                "train.pair_pass=split"
            )
            return f"out of memory: {cause}\n  → {hint}", 1
        cause = cause.__cause__ or cause.__context__
    text = f"unexpected {type(error).__name__}: {error}"
    return f"{text}\n  → run it again with --debug for the traceback; this may be a bug worth reporting", 1


def _fail(message: str, code: int, as_json: bool = False, error: BaseException | None = None) -> NoReturn:
    print(f"lora-dpo: {message}", file=sys.stderr)
    if as_json:
        document: dict[str, Any] = {"error": message, "exit_code": code}
        if isinstance(error, UserError):
            document |= {"error": error.what, "where": error.where, "hint": error.hint}
        problems = getattr(error, "problems", None)
        if problems is not None:
            document["problems"] = [problem.as_json() for problem in problems]
        print(json.dumps(document, indent=2))
    sys.exit(code)


@contextlib.contextmanager
def _reserved_stdout(as_json: bool) -> Iterator[None]:
    """With --json, whatever a library prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"lora-dpo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the command line).")] = False,
) -> None:
    del version, debug  # `main` reads --debug itself, so that it works after the command too


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Folder of the run; the same folder resumes. Default: runs/NAME.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Push the adapter here when it is done.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; a run that is in the folder is renamed, never deleted.")
    ] = False,
    resume: Annotated[
        Resume, typer.Option("--resume", help="auto: go on with a run that is in the folder; never: refuse to.")
    ] = Resume.auto,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, verify it, and compare it with the base on held-out prompts.

    Run again in the same folder, it resumes, or says that it is finished.
    """
    from lora_dpo import recipe as recipes_
    from lora_dpo.summary import summary

    resolved = recipes_.load(recipe, overrides or [])
    directory = run_dir or Path(resolved.output.run_dir or f"runs/{resolved.name}")
    with _reserved_stdout(as_json):
        from lora_dpo import build

        outcome = build.run(
            resolved, directory, push_to_hub=push_to_hub or resolved.output.hub_repo, quiet=quiet, fresh=fresh,
            resume=resume is Resume.auto,
        )  # fmt: skip
    if as_json and outcome.is_main:
        _print_json(outcome.result | {"run_dir": str(directory), "pushed": outcome.pushed})
    elif outcome.is_main:
        print(summary(outcome.result, directory, already=outcome.already, pushed=outcome.pushed))


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe and show it resolved: defaults, what it extends and overrides filled in."""
    from lora_dpo import recipe as recipes_

    resolved = recipes_.load(recipe, overrides or [])
    if as_json:
        _print_json({"ok": True, "recipe": resolved.model_dump(mode="json")})
    else:
        print(recipes_.dump(resolved), end="")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="24GB", help="A card's memory. Default: this machine's, if any.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Tell a run's steps, pairs and peak memory by part, and whether it fits a card.

    Neither the card nor the base's weights are needed. Without data.path everything but the pairs is told.
    """
    from lora_dpo import recipe as recipes_
    from lora_dpo.plan_table import text

    resolved, has_data = recipes_.load_with_or_without_data(recipe, overrides or [])
    with _reserved_stdout(as_json):
        from lora_dpo import plan as plans

        document = plans.run(resolved, has_data, gpu=gpu, quiet=quiet)
    _print_json(document) if as_json else print(text(document))


@app.command()
def cache(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every row that the recipe uses; encode again what is damaged.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what no pairs are made of, and rests of processes that ended.")
    ] = False,
    all_but_this: Annotated[
        bool, typer.Option("--all-but-this", help="With --prune: also what only other recipes use.")
    ] = False,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", min=0, help="With --prune: also what wasn't used for so long.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete the other recipes' part, which is only listed else.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show what is there and which of it the recipe uses.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Encode a recipe's pictures and prompts ahead of training; or check, clear out or show what is encoded.

    Several processes may do it at once: they divide the work.
    """
    from lora_dpo import recipe as recipes_
    from lora_dpo.cache_table import text

    resolved = recipes_.load(recipe, overrides or [])
    with _reserved_stdout(as_json):
        from lora_dpo import caching

        wanted = caching.Wanted(verify, prune, stats, all_but_this, unused_days, yes)
        document = caching.run(resolved, wanted, quiet=quiet)
    if document is not None:
        _print_json(document) if as_json else print(text(document))


@app.command()
def export(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_ADAPTER...", help="Run folders, adapter folders or adapter files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    step: Annotated[int | None, typer.Option("--step", help="A run's checkpoint instead of its end.")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Resize to this rank by singular value decomposition.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Of each source, in order. Default: their mean.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole pipeline, adapter merged in.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Base model, where the adapter doesn't say it.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="sdxl or stable_diffusion, with --base.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the file in kohya's layout. Default: OUT's.")] = None,
    verify: Annotated[bool, typer.Option(help="Reload what was written and compare predictions.")] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Write an adapter in other shapes: another rank, a mean of several, a checkpoint, merged into the model."""
    with _reserved_stdout(as_json):
        from lora_dpo import reexport

        result = reexport.run(
            sources, out, step=step, rank=rank, weights=weight, merge=merge, base=base, family=family, dtype=dtype,
            name=name, verify=verify, device=device, tell=_say,
        )  # fmt: skip
    if as_json:
        _print_json(result)
    else:
        print(result.get("pipeline") or result["adapter"])
        if result.get("adapter_kohya"):
            print(result["adapter_kohya"])


def _say(message: str) -> None:
    print(message, file=sys.stderr)


@app.command()
def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where runs will go.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Tell what this machine has and what of it works; exit code 1 if something is broken that a run needs."""
    from lora_dpo import doctor as doctors
    from lora_dpo import doctor_table
    from lora_dpo.file_digests import default_cache_dir

    with _reserved_stdout(as_json), doctor_table.waiting(sys.stderr) as step:
        findings = doctors.examine(run_dir, default_cache_dir(), step=step)
    healthy = doctors.healthy(findings)
    if as_json:
        _print_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        doctor_table.show(findings, sys.stdout)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check TOML."""
    from lora_dpo.recipe import json_schema

    _print_json(json_schema())


@app.command("app")
def open_app(
    run: Annotated[
        Path | None, typer.Option("--run", help="A finished run's folder. Default: all below runs/.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The default is reachable from this machine only.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Default: the first free one from 7860 on.")] = None,
) -> None:
    """Compare base and adapted pictures side by side, from the same seed, in the browser."""
    if run is not None and not (run / "result.json").is_file():
        raise UserError("this is no finished run: it has no result.json", where=run, hint="train it to its end")
    try:
        launch = _app_package().launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the app needs gradio", hint='pip install "lora-dpo[app]"') from error
    launch(run, host, port)


def _app_package() -> Any:
    """The app's page: inside the package in a wheel, beside it in a checkout; never found by name on the path."""
    package = Path(__file__).resolve().parent
    folder = package / "_app" if (package / "_app").is_dir() else package.parent / "app"
    spec = importlib.util.spec_from_file_location(
        "app", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise LoraDpoError(f"{folder} is missing from this installation; install lora-dpo again")
    sys.modules[APP] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[APP])
    return importlib.import_module(f"{APP}.page")
