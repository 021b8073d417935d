from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_dpo import __version__, build, cli
from lora_dpo.errors import LoraDpoError, UserError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command, in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_version(capsys) -> None:
    assert run(capsys, "--version") == (0, f"lora-dpo {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["recipes", "ls"], ["check", "quickstart"], ["check", "nowhere"], ["schema"],
     ["train", "quickstart", "train.steps=x"], ["train", "--help"]],
)  # fmt: skip
def test_nothing_heavy_is_imported_for_help_and_recipe_errors(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom lora_dpo.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch','diffusers','transformers','peft','accelerate','gradio','matplotlib','pyarrow','numpy','PIL'}"
        "\nprint(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_check_shows_the_resolved_recipe(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "check", "quickstart", "train.steps=7")
    assert code == 0
    assert "steps = 7" in out
    (tmp_path / "again.toml").write_text(out)
    assert run(capsys, "check", str(tmp_path / "again.toml"))[1] == out
    document = json.loads(run(capsys, "check", "quickstart", "train.steps=7", "--json")[1])
    assert document["recipe"]["train"]["steps"] == 7


def test_a_wrong_recipe_exits_with_2_and_a_message_without_traceback(capsys) -> None:
    code, out, err = run(capsys, "check", "quickstart", "train.stpes=7", "adapter.rank=-1")
    assert (code, out) == (2, "")
    assert "2 problems" in err
    assert "train.stpes: unknown key (did you mean steps?)" in err
    assert "Traceback" not in err


def test_json_errors_are_one_document(capsys) -> None:
    code, out, err = run(capsys, "check", "quickstart", "train.stpes=7", "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 2
    assert document["problems"][0]["key"] == "train.stpes"
    assert "stpes" in err


def test_debug_raises_wherever_it_stands(capsys) -> None:
    for arguments in (["--debug", "check", "nowhere"], ["check", "nowhere", "--debug"]):
        with pytest.raises(UserError):
            cli.main(arguments)
    capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["train"], ["nonsense"], ["train", "quickstart", "--nonsense"]])
def test_usage_errors_exit_with_2(capsys, arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_recipes_ls_cat_cp(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "recipes", "ls")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert {"quickstart", "sdxl_lora", "sd15_lora", "sd21_lora"} <= set(names)
    assert [row["name"] for row in json.loads(run(capsys, "recipes", "ls", "--json")[1])] == names
    assert all(row["about"] for row in json.loads(run(capsys, "recipes", "ls", "--json")[1]))
    text = run(capsys, "recipes", "cat", "quickstart")[1]
    assert run(capsys, "recipes", "cp", "quickstart", str(tmp_path))[0] == 0
    copy = tmp_path / "quickstart.toml"
    assert copy.read_text("utf-8") == text
    copy.write_text("mine")
    assert run(capsys, "recipes", "cp", "quickstart", str(copy))[0] == 2
    assert copy.read_text() == "mine"
    assert run(capsys, "recipes", "cp", "quickstart", str(copy), "--force")[0] == 0
    assert run(capsys, "recipes", "cp", "quickstart", str(tmp_path / "no" / "x.toml"))[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("wrong", "file:3", "mend it"), 2, "file:3: wrong\n  → mend it"),
        (LoraDpoError("diverged"), 1, "diverged"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "/x: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x: permission denied"),
        (MemoryError(), 1, "micro_batch_pairs"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 130, "resumes"),
    ],
)
def test_every_failure_has_its_exit_code_and_a_readable_line(capsys, monkeypatch, error, code: int, part: str) -> None:
    def fail(*_args, **_kwargs) -> None:
        raise error

    monkeypatch.setattr(build, "run", fail)
    found, out, err = run(capsys, "train", "quickstart")
    assert (found, out) == (code, "")
    assert part in err
    assert "Traceback" not in err
    assert json.loads(run(capsys, "train", "quickstart", "--json")[1])["exit_code"] == code


def test_an_operating_systems_refusal_is_found_under_another_error() -> None:
    error = RuntimeError("could not write")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "no space left" in cli.explain(error)[0]


def test_ctrl_c_exits_with_130() -> None:
    script = (
        "import sys, time\nfrom lora_dpo import cli, recipe\n"
        "def load(*_):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "recipe.load = load\ncli.main(['check', 'quickstart'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_the_app_wants_a_finished_run_and_gradio(capsys, tmp_path: Path, monkeypatch) -> None:
    code, _, err = run(capsys, "app", "--run", str(tmp_path))
    assert code == 2
    assert "no finished run" in err
    monkeypatch.setitem(sys.modules, "gradio", None)
    (tmp_path / "result.json").write_text("{}")
    code, _, err = run(capsys, "app", "--run", str(tmp_path))
    assert code == 2
    assert 'pip install "lora-dpo[app]"' in err


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m lora_dpo schema | head -c 1", shell=True, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
