"""The doctor finds what is broken, on machines that are made to be so."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from lora_dpo import cli, doctor, doctor_table, optimizers, run_lock, tinyworld
from lora_dpo.doctor import GIB, Finding


def examined(tmp_path: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(tmp_path / "runs", tmp_path / "cache")}


def named(findings, name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_this_machine_can_train(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_NotForOthers")
    code, out, err = run(capsys, "--run-dir", str(tmp_path / "runs"), "--json")
    document = json.loads(out)
    found = {entry["name"]: entry for entry in document["findings"]}
    assert (code, document["ok"]) == (0, True), document
    assert set(doctor.REQUIRED) | set(doctor.OPTIONAL) | {"python", "lora-dpo", "cpu", "memory", "runs"} <= set(found)
    assert found["torch"]["value"] == torch.__version__
    assert "adamw8bit, lion8bit works" in found["8-bit optimizers"]["value"]
    assert 0 < found["runs"]["figures"]["free_gib"] < found["runs"]["figures"]["total_gib"]
    assert 0 < found["memory"]["figures"]["free_gib"] < found["memory"]["figures"]["total_gib"]
    assert found["cache"]["figures"]["path"] == str(tmp_path / "cache")
    assert found["network"]["value"].startswith("offline")
    assert found["token"]["value"] == "present"
    assert "NotForOthers" not in out + err
    assert not list(tmp_path.iterdir())


def test_what_a_run_needs_is_a_problem_and_the_exit_code_says_so(capsys, tmp_path, monkeypatch) -> None:
    def broken(module: str):
        raise ImportError(f"{module}.so: undefined symbol\nand more")

    monkeypatch.setattr(doctor, "import_module", broken)
    monkeypatch.setattr(doctor, "USED", {"diffusers": doctor.USED["diffusers"]})
    monkeypatch.setattr(tinyworld, "changed_files", lambda: ["base/unet/config.json"])
    code, out, _ = run(capsys, "--run-dir", str(tmp_path))
    assert code == 1
    lines = out.splitlines()
    assert any(line.startswith("problem  diffusers ") and "undefined symbol" in line for line in lines)
    assert any("→ pip install -U" in line and "diffusers" in line for line in lines)
    assert any(line.startswith("problem  tiny world ") and "base/unet/config.json" in line for line in lines)
    assert lines[-1].startswith("2 problems and ")
    assert "and more" not in out


def test_a_version_outside_the_declared_range(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_declared_ranges", lambda: {"peft": ">=99", "gradio": ">=99"})
    found = list(doctor._software())
    assert (named(found, "peft").status, named(found, "gradio").status) == ("problem", "warning")
    assert named(found, "peft").advice == 'pip install -U "peft>=99"'
    assert 'pip install "lora-dpo[app]"' in named(found, "gradio").advice


def test_optional_packages_may_be_missing_and_needed_ones_not(monkeypatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("gradio", "bitsandbytes", "accelerate"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = list(doctor._software())
    assert (named(found, "gradio").status, named(found, "gradio").value) == ("ok", "not installed")
    assert named(found, "accelerate").status == "problem"
    assert doctor._eight_bit() == Finding(
        "devices", "8-bit optimizers", "ok", "bitsandbytes is not installed", 'pip install "lora-dpo[bitsandbytes]"'
    )


def test_eight_bit_steps_that_fail_or_change_nothing_are_warnings(monkeypatch) -> None:
    def no_kernel(*_args, **_options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(optimizers, "build", no_kernel)
    found = doctor._eight_bit()
    assert (found.status, found.value) == ("warning", "no step on cpu: no kernel image is available")
    assert "adamw" in found.advice
    monkeypatch.setattr(optimizers, "build", lambda *_, **__: SimpleNamespace(step=lambda: None))
    assert doctor._eight_bit().value == "a step of adamw8bit on cpu went wrong"


@pytest.mark.parametrize(
    ("major", "free", "trial", "status", "parts"),
    [
        (9, 78, "", "ok", ["78.0 of 80.0 GiB free", "bfloat16 yes"]),
        (7, 78, "", "ok", ["bfloat16 no", 'at "float32"']),
        (9, 20, "", "warning", ["nvidia-smi"]),
        (9, 78, "no kernel image", "problem", ["a training step fails: no kernel image", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_gpu(monkeypatch, major, free, trial, status, parts) -> None:
    about = SimpleNamespace(name="Card", total_memory=80 * GIB, major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(doctor, "_trial", lambda device: trial if device == "cuda:0" else "")
    found = list(doctor._devices())
    card = named(found, "cuda:0")
    assert card.status == status
    assert all(part in f"{card.value} {card.advice}" for part in parts)
    assert named(found, "cpu").status == "ok"


def test_a_card_that_torch_can_not_use(monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    cpu = named(doctor._devices(), "cpu")
    assert cpu.status == "warning"
    assert "an NVIDIA card is here, but torch" in cpu.advice


def test_a_cpu_on_which_nothing_trains(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_trial", lambda _: "illegal instruction")
    (cpu,) = doctor._devices()
    assert (cpu.status, cpu.value) == ("problem", "a training step fails: illegal instruction")


def test_disks_that_are_nearly_full(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(100 * GIB, 99 * GIB, 1 * GIB))
    assert {f.status for f in doctor._disks({"runs": tmp_path, "cache": tmp_path})} == {"warning"}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(100 * GIB, 100 * GIB, 1000))
    found = list(doctor._disks({"runs": tmp_path, "cache": tmp_path}))
    assert [f.status for f in found] == ["problem", "problem", "warning"]  # the last is the hub's
    assert "LORA_DPO_CACHE" in named(found, "cache").advice


def test_places_that_can_not_be_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    found = named(doctor._disks({"runs": tmp_path / "file" / "runs"}), "runs")
    assert found.status == "problem"
    assert found.value.startswith("can't be written: a file is in its way")

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    found = named(doctor._disks({"runs": tmp_path / "runs"}), "runs")
    assert (found.status, found.advice) == ("problem", "give another --run-dir")
    assert "Read-only file system" in found.value


def test_a_file_system_without_locks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "try_lock", lambda _: run_lock.Answer.UNSUPPORTED)
    found = named(doctor._disks({"runs": tmp_path}), "runs")
    assert found.status == "warning"
    assert "no locks" in found.advice


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def test_the_hub_answers_or_not(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert named(doctor._hub(), "network").status == "ok"
        thread.join()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        found = named(doctor._hub(), "network")
    assert found.status == "warning"
    assert "not reachable" in found.value


def test_an_examination_that_breaks_is_a_finding_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    def broken():
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "_memory", broken)
    found = examined(tmp_path)
    assert (found["memory"].status, found["memory"].value) == ("problem", "OSError: no /proc here")
    assert "tiny world" in found


def test_on_a_terminal() -> None:
    findings = [
        Finding("devices", "cuda:0", "ok", "Card"),
        Finding("machine", "runs", "problem", "full", "free some space"),
        Finding("machine", "cache", "warning", "nearly full"),
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=60, record=True, color_system="truecolor")
    doctor_table.draw(findings, console)
    text = console.export_text()
    assert [line.split() for line in text.splitlines() if line.strip()] == [
        ["devices"],
        ["✓", "cuda:0", "Card"],
        ["machine"],
        ["✗", "runs", "full"],
        ["→", "free", "some", "space"],
        ["!", "cache", "nearly", "full"],
        ["1", "problem", "and", "1", "warning:", "runs", "will", "fail", "until", "the", "problems"],
        ["are", "mended"],
    ]
