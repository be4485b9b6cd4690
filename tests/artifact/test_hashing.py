"""artifact/hashing.py: what a writer knows is what a reader finds, and a damaged file has another hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifact.hashing import combined_hash, plain_sha256, sha256_of
from artifact.tensor_file import plan_tensors, write_tensors


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, str]:
    """A file of two tensors, and the hash that its writer knows."""
    header, planned = plan_tensors("x.safetensors", {"b": ("F16", (3,)), "a": ("F32", (2, 2))})
    arrays = (np.arange(3, dtype=np.float16), np.ones((2, 2), np.float32))
    tensors = write_tensors(tmp_path / "x.safetensors", header, planned, (memoryview(array).cast("B") for array in arrays))
    return tmp_path / "x.safetensors", combined_hash(header, (tensor.blake3 for tensor in tensors))


def test_a_writers_hash_is_a_readers(written: tuple[Path, str]) -> None:
    assert sha256_of(written[0]) == written[1]


def test_every_changed_byte_changes_it(written: tuple[Path, str]) -> None:
    path, sha256 = written
    raw = path.read_bytes()
    for place in (0, 9, 200, len(raw) - 1, len(raw) - 20):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert sha256_of(path) != sha256, place
    for damaged in (raw[:-1], raw + b"x", raw[:5], b"", b"\xff" * 8):
        path.write_bytes(damaged)
        assert sha256_of(path) == hashlib.sha256(damaged).hexdigest()


def test_another_librarys_file_is_covered_whole(tmp_path: Path) -> None:
    path = tmp_path / "y.safetensors"
    save_file({"a": np.arange(5, dtype=np.int64), "b": np.arange(4, dtype=np.float16)}, path)
    before = sha256_of(path)
    assert before != hashlib.sha256(path.read_bytes()).hexdigest()  # by tensor, not the plain one
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert sha256_of(path) != before


def test_other_files_have_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"graph")
    assert sha256_of(tmp_path / "x.onnx") == plain_sha256(tmp_path / "x.onnx") == hashlib.sha256(b"graph").hexdigest()
