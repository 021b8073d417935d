"""A digest is remembered only while nothing can have changed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from lora_dpo import file_digests
from lora_dpo.data.pickapic import PickAPicParquet
from lora_dpo.families.stable_diffusion import StableDiffusion
from lora_dpo.families.tensor_file import TensorFile
from tests.support.models import save_random_pairs, save_random_sd
from tests.support.single_file import save_single_file


@pytest.fixture
def read(tmp_path: Path, monkeypatch) -> list[Path]:
    """What was read; files that are just made count as old."""
    monkeypatch.setenv("LORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "TICK_SECONDS", 0.0)
    seen, real = [], file_digests._read
    monkeypatch.setattr(file_digests, "_read", lambda path: seen.append(path) or real(path))
    return seen


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def settle() -> None:
    """Until the file system's clock has moved on."""
    time.sleep(0.02)


def test_a_file_is_read_once(tmp_path: Path, read: list[Path]) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    assert file_digests.file_digest(file) == file_digests.file_digest(file) == blake(b"one")
    assert list(file_digests.file_digests([file, file])) == [blake(b"one")] * 2
    assert read == [file]


@pytest.mark.parametrize(
    "how", ["in place", "in place, its time set back", "replaced", "replaced by one as old", "moved"]
)
def test_another_content_is_never_missed(tmp_path: Path, read: list[Path], how: str) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    before = file.stat()
    assert file_digests.file_digest(file) == blake(b"one")
    settle()
    match how:
        case "in place":
            file.write_bytes(b"two")
        case "in place, its time set back":
            with file.open("r+b") as opened:
                opened.write(b"two")
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert file.stat().st_mtime_ns == before.st_mtime_ns
        case "replaced" | "replaced by one as old":
            os.replace(other, file)
        case _:
            file = file.rename(tmp_path / "c")
            file.write_bytes(b"two")
    assert file_digests.file_digest(file) == blake(b"two")
    assert list(file_digests.file_digests([file])) == [blake(b"two")]


def test_a_file_that_just_changed_is_read_each_time(tmp_path: Path, read: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(file_digests, "TICK_SECONDS", 10.0)
    file = tmp_path / "a"
    for content in (b"one", b"two", b"tri"):
        file.write_bytes(content)
        assert file_digests.file_digest(file) == blake(content)
    assert len(read) == 3
    # Its time of modification doesn't make it old.
    os.utime(file, (1e9, 1e9))
    file_digests.file_digest(file)
    assert len(read) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, read: list[Path], monkeypatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    settle()
    real = file_digests._read

    def slow(path: Path) -> bytes:
        digest = real(path)
        file.write_bytes(b"two")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(file_digests, "_read", slow)
        assert file_digests.file_digest(file) == blake(b"one")
    assert file_digests.file_digest(file) == blake(b"two")


def test_many_files_in_their_order(tmp_path: Path, read: list[Path]) -> None:
    files = [tmp_path / str(number) for number in range(600)]
    for number, file in enumerate(files):
        file.write_bytes(str(number).encode())
    expected = [blake(str(number).encode()) for number in range(600)]
    assert list(file_digests.file_digests(files)) == expected
    assert list(file_digests.file_digests(files[::-1])) == expected[::-1]
    assert len(read) == 600


@pytest.mark.parametrize("how", ["no database", "a flipped bit", "can't be written"])
def test_a_damaged_memory_is_none(tmp_path: Path, read: list[Path], monkeypatch, how: str) -> None:
    file, base = tmp_path / "a", tmp_path / "cache" / file_digests.FILE
    file.write_bytes(b"one")
    file_digests.file_digest(file)
    match how:
        case "no database":
            base.write_bytes(b"x" * 5000)
        case "a flipped bit":
            with sqlite3.connect(base) as connection:
                [(digest,)] = connection.execute("select digest from digests").fetchall()
                connection.execute("update digests set digest = ?", (bytes([digest[0] ^ 1, *digest[1:]]),))
            connection.close()
        case _:
            monkeypatch.setenv("LORA_DPO_CACHE", str(file / "below a file"))
    assert file_digests.file_digest(file) == blake(b"one")
    assert len(read) == 2
    assert file_digests.file_digest(file) == blake(b"one")
    assert len(read) == (3 if how == "can't be written" else 2)


def test_a_missing_file_is_an_error(tmp_path: Path, read: list[Path]) -> None:
    with pytest.raises(FileNotFoundError):
        file_digests.file_digest(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        list(file_digests.file_digests([tmp_path / "none"]))


def test_a_run_that_starts_again_reads_neither_data_nor_weights(tmp_path: Path, read: list[Path]) -> None:
    base = save_random_sd(tmp_path / "base")
    data = save_random_pairs(tmp_path / "pairs.parquet", 3, size=16)
    first = (StableDiffusion(base).fingerprint(), PickAPicParquet(data).fingerprint())
    assert read
    read.clear()
    assert (StableDiffusion(base).fingerprint(), PickAPicParquet(data, split=None).fingerprint()) == first
    assert PickAPicParquet(data, split="other").fingerprint() != first[1]
    assert read == []


def test_of_one_file_too_the_edited_weights_are_seen(tmp_path: Path, read: list[Path], monkeypatch) -> None:
    file = save_single_file(save_random_sd(tmp_path / "base"), tmp_path / "base.safetensors")
    family = lambda: StableDiffusion(file, config=tmp_path / "base")  # noqa: E731
    first = family().fingerprint()
    assert family().fingerprint() == first
    computed = []
    real = TensorFile._digest
    monkeypatch.setattr(TensorFile, "_digest", lambda self, names: computed.append(names) or real(self, names))
    assert family().fingerprint() == first
    assert computed == []
    settle()
    data = bytearray(file.read_bytes())
    where = next(iter(n for n in range(len(data) - 200_000, len(data)) if data[n] not in (0, 255)))
    data[where] ^= 1
    file.write_bytes(data)
    assert family().fingerprint() != first
    assert len(computed) == 3
