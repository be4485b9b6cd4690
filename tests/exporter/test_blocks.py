"""exporter/blocks.py: what a value must not be, counted over the whole tensor; bytes as they lie, or converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifact.errors import CheckpointError, ExportError
from artifact.tensor_file import StoredTensor
from exporter import blocks
from exporter.blocks import count_not_finite, raw_place, tensor_blocks
from exporter.checkpoints import Checkpoint, open_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a tiny tensor."""
    monkeypatch.setattr(blocks, "RAW_BYTES", 1000)
    monkeypatch.setattr(blocks, "ROW_BYTES", 1000)


@pytest.fixture
def opened(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Checkpoint]:
    """``opened(dtype, change)``: a tiny checkpoint of that dtype after ``change(tensors)``."""

    def make(dtype: torch.dtype, change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None) -> Checkpoint:
        folder = make_checkpoint(tmp_path / "c")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return open_checkpoint(str(folder))

    return make


def stored(checkpoint: Checkpoint, dtype: str = "fp16") -> bytes:
    word = {"fp16": "F16", "fp32": "F32"}[dtype]
    planned = StoredTensor(NAME, "", word, checkpoint.shapes[NAME], 0, 0)
    return b"".join(bytes(block) for block in tensor_blocks(checkpoint, planned, dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dtype", "target"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_blocks_joined_are_the_converted_tensor(opened: Callable[..., Checkpoint], source: torch.dtype, dtype: str, target: torch.dtype) -> None:
    checkpoint = opened(source)
    assert (raw_place(checkpoint, NAME, {"fp16": "F16", "fp32": "F32"}[dtype]) is not None) == (source == target)
    assert stored(checkpoint, dtype) == bytes(checkpoint.read(NAME).to(target).numpy().data.cast("B"))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted_over_the_whole_tensor(opened: Callable[..., Checkpoint], source: torch.dtype, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][0, 0] = tensors[NAME][40, 1] = tensors[NAME][-1, -1] = value

    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 3 of 1536 values are NaN or Inf"):
        stored(opened(source, spoil))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_overflow_is_counted_over_the_whole_tensor_and_says_what_would_work(opened: Callable[..., Checkpoint], source: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][0, 0], tensors[NAME][-1, -1], tensors[NAME][2, 2] = 2.0**20, -(2.0**17), 65504.0 if source is torch.float32 else 1.0

    checkpoint = opened(source, spoil)
    with pytest.raises(ExportError, match=r"up_proj\.weight: 2 of 1536 values overflow fp16 \(largest 1.04858e\+06, limit 65504\)") as caught:
        stored(checkpoint)
    assert caught.value.hint == "export with --dtype fp32"
    assert len(stored(checkpoint, "fp32")) == 4 * 1536


def test_a_matrix_that_float16_rounds_to_nothing_is_refused(opened: Callable[..., Checkpoint]) -> None:
    checkpoint = opened(torch.bfloat16, lambda tensors: tensors[NAME].mul_(1e-8))
    with pytest.raises(ExportError, match=r"up_proj\.weight: fp16 loses its values \(correlation 0\.0000"):
        stored(checkpoint)


def test_a_matrix_of_zeros_is_the_checkpoints_own_affair(opened: Callable[..., Checkpoint]) -> None:
    assert stored(opened(torch.bfloat16, lambda tensors: tensors[NAME].zero_())) == bytes(2 * 1536)


def test_a_file_that_shrank_is_an_error(opened: Callable[..., Checkpoint]) -> None:
    checkpoint = opened(torch.float16)
    path = Path(checkpoint.source) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before byte"):
        stored(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scan_agrees_with_isfinite(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    edge = [finfo.max, finfo.min, finfo.tiny, -0.0, 0.0, float("inf"), float("-inf"), float("nan"), -float("nan")]
    values = torch.tensor(edge * 30000, dtype=dtype)
    assert count_not_finite(values) == int((~torch.isfinite(values)).sum()) == 4 * 30000


def test_the_fixture_is_not_the_default(opened: Callable[..., Checkpoint]) -> None:
    checkpoint = opened(torch.float16)
    planned = StoredTensor(NAME, "", "F16", checkpoint.shapes[NAME], 0, 0)
    assert sum(1 for _ in tensor_blocks(checkpoint, planned, "fp16")) == 4  # 3072 bytes in blocks of 1000
    assert json.loads((Path(checkpoint.source) / "config.json").read_text())["hidden_size"] == 32
