from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from artifact.errors import CheckpointError
from exporter.checkpoints.safetensors_file import open_safetensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "b": torch.ones(4)}, path, metadata={"format": "pt"})
    return path


def header(path: Path, text: str, data: bytes = b"") -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return path


def test_open_safetensors_says_where_each_tensor_lies(file: Path) -> None:
    opened = open_safetensors(file)
    a = opened.tensors["a"]
    assert (a.dtype, a.shape, a.length) == ("BF16", (2, 3), 12)
    assert torch.frombuffer(bytearray(file.read_bytes()[a.offset : a.offset + a.length]), dtype=torch.bfloat16).tolist() == [0, 1, 2, 3, 4, 5]
    assert set(opened.tensors) == {"a", "b"}


def test_read_keeps_dtype_and_values(file: Path) -> None:
    tensor = open_safetensors(file).tensors["a"].read()
    assert tensor.dtype == torch.bfloat16
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("lost", [1, 20])
def test_open_safetensors_says_how_many_bytes_a_truncated_file_lacks(file: Path, lost: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-lost])
    with pytest.raises(CheckpointError, match=rf"^model\.safetensors: header says {len(whole)} bytes, the file has {len(whole) - lost}$"):
        open_safetensors(file)


@pytest.mark.parametrize("size", [0, 5, 30])
def test_open_safetensors_refuses_a_file_cut_within_its_header(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"header needs .* bytes, the file has {size}$"):
        open_safetensors(file)


@pytest.mark.parametrize("text", ["not json", "[1]", '{"a": 3}', '{"a": {"dtype": "F32", "shape": [1]}}', "{" + '"a":' * 50])
def test_open_safetensors_refuses_a_header_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="header can't be read"):
        open_safetensors(header(tmp_path / "x.safetensors", text))


def test_open_safetensors_refuses_a_name_given_twice(tmp_path: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        open_safetensors(header(tmp_path / "x.safetensors", f"{{{entry}, {entry}}}", bytes(4)))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_open_safetensors_refuses_what_the_library_finds_inconsistent(tmp_path: Path, entry: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_safetensors(header(tmp_path / "x.safetensors", json.dumps({"a": entry}), bytes(4)))
