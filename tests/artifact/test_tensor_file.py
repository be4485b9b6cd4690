"""artifact/tensor_file.py: what we stream, the safetensors library reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from artifact.errors import ArtifactError
from artifact.tensor_file import PAGE, checksums_json, plan_tensors, read_checksums, write_tensors

TENSORS = {"z": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.arange(4, dtype=np.float32), "i": np.array([[1, -2]], dtype=np.int8)}
DTYPES = {"z": "F16", "a": "F32", "i": "I8"}


def write(path: Path) -> list:
    header, planned = plan_tensors("weights/x.safetensors", {name: (DTYPES[name], array.shape) for name, array in TENSORS.items()})
    return write_tensors(path, header, planned, (memoryview(array).cast("B") for array in TENSORS.values()))


def test_written_file_reads_back_with_the_library(tmp_path: Path) -> None:
    stored = write(tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    assert [tensor.name for tensor in stored] == ["z", "a", "i"]  # the order given, not sorted


def test_offsets_point_at_the_bytes_and_data_starts_on_a_page(tmp_path: Path) -> None:
    stored = write(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert stored[0].offset % PAGE == 0
    for tensor in stored:
        assert raw[tensor.offset : tensor.offset + tensor.length] == TENSORS[tensor.name].tobytes()


def test_wrong_length_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    header, planned = plan_tensors("weights/x.safetensors", {"w": ("F16", (2, 2))})
    with pytest.raises(ArtifactError, match=r"weights/x\.safetensors: w has 4 bytes, planned were 8"):
        write_tensors(tmp_path / "x", header, planned, [memoryview(b"1234")])


def test_checksums_read_back(tmp_path: Path) -> None:
    stored = write(tmp_path / "x.safetensors")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "checksums.json").write_text(checksums_json(stored))
    assert read_checksums(tmp_path) == {tensor.name: tensor for tensor in stored}


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"w": {"file": 1}}'], ids=["missing", "broken", "list", "incomplete"])
def test_unreadable_checksums_are_an_artifact_error(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "weights").mkdir()
    if text is not None:
        (tmp_path / "weights" / "checksums.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"checksums\.json"):
        read_checksums(tmp_path)


def test_a_tensor_may_come_in_blocks_whose_buffers_take_turns(tmp_path: Path) -> None:
    values = np.arange(5000, dtype=np.float16)
    header, planned = plan_tensors("weights/x.safetensors", {"w": ("F16", (2500,)), "v": ("F16", (2500,))})
    buffers = [bytearray(1000), bytearray(1000)]

    def blocks() -> Iterator[memoryview]:
        for number, start in enumerate(range(0, values.nbytes, 1000)):
            buffers[number % 2][:] = values.tobytes()[start : start + 1000]
            yield memoryview(buffers[number % 2])

    stored = write_tensors(tmp_path / "x.safetensors", header, planned, blocks())
    assert [tensor.blake3 for tensor in stored] == [blake3(half.tobytes()).hexdigest() for half in np.split(values, 2)]
    assert np.array_equal(load_file(tmp_path / "x.safetensors")["v"], values[2500:])


def test_more_or_less_data_than_planned_is_an_error(tmp_path: Path) -> None:
    header, planned = plan_tensors("weights/x.safetensors", {"w": ("F16", (2, 2))})
    for blocks, message in (([bytes(8), bytes(8)], "more data"), ([bytes(6)], "w has 6 bytes"), ([bytes(6), bytes(6)], "w has 12 bytes")):
        with pytest.raises(ArtifactError, match=message):
            write_tensors(tmp_path / "x.safetensors", header, planned, map(memoryview, blocks))
