"""Mapped tensors are the file's, and reading them leaves nothing behind."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_dpo.cache_store import Reader, Store
from lora_dpo.mapped_tensors import DTYPES, mapped


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_is_read_is_what_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(24).reshape(2, 3, 4).to(dtype),
        "odd": torch.ones(3, dtype=torch.uint8),
        "none": torch.zeros(0, 3, dtype=dtype),
        "number": torch.tensor(7).to(dtype),
    }
    save_file(tensors, tmp_path / "x", {"word": "ä b"})
    read, metadata = mapped(tmp_path / "x")
    assert metadata == {"word": "ä b"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    mapped(tmp_path / "x")[0]["a"].fill_(1.0)
    gc.collect()
    assert (tmp_path / "x").read_bytes() == before


def header(changes: dict[str, object]) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 8, b"\xff" * 64, b"\x05" + b"\0" * 7 + b"[1,2]", b"\x02" + b"\0" * 7 + b"{}"[:1],
        header({"data_offsets": [0, 12], "shape": [3]}), header({"shape": [3]}), header({"dtype": "F8"}),
        header({"shape": "22"}), header({"data_offsets": [-8, 0]}), header({"data_offsets": [0]}),
        header({"shape": [-2], "data_offsets": [8, 0]}), header({})[:-1],
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_a_value_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r".+"):
        mapped(tmp_path / "x")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux")
def test_reading_leaves_no_memory_behind(tmp_path: Path) -> None:
    store = Store(tmp_path, {}, bytes_per_shard=1)
    for shard in range(80):  # more than are open at once
        store.add([f"{shard}-{row}" for row in range(4)], {name: torch.zeros(4, 16) for name in "abc"})
    reader = Reader(sorted(tmp_path.glob("*.safetensors")))

    def kib() -> int:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))

    def read(times: int) -> None:
        for number in range(times):
            reader.read(number % 80 if number % 4 == 0 else 0, number % 4)

    read(2000)
    before = kib()
    read(20_000)  # a fourth of them from a shard that has to be opened again
    assert kib() - before < 1024
