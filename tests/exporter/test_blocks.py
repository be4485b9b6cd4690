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


def test_float32_too_small_to_be_squared_is_refused(opened: Callable[..., Checkpoint]) -> None:
    """The square of 1e-25 is 0 in float32."""
    checkpoint = opened(torch.float32, lambda tensors: tensors[NAME].fill_(1e-25))
    with pytest.raises(ExportError, match=r"up_proj\.weight: fp16 loses its values \(correlation 0\.0000"):
        stored(checkpoint)
    assert len(stored(checkpoint, "fp32")) == 4 * 1536


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zeros", [0, 100, 1500])
def test_rows_that_are_lost_beside_others_are_no_loss(opened: Callable[..., Checkpoint], source: torch.dtype, zeros: int) -> None:
    """Padding of an embedding: rows of nothing, and of noise that float16 can't hold."""

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME].flatten()[:zeros] = 0
        tensors[NAME].flatten()[768:1200] *= 1e-8

    assert len(stored(opened(source, pad))) == 2 * 1536


@pytest.mark.parametrize("size", [1.0, 1e-3, 2.0**-14, 3e-5, 1e-5, 1e-6, 3e-7, 1e-7, 1e-9])
def test_sample_shows_no_more_than_all_products_do(size: float) -> None:
    """The correlation of a tally is never above that of all values, beyond what KEPT_SQUARE allows."""
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * size
    tally = blocks.Tally("x", "fp16")
    before, after = rows.double().flatten(), tally.add(rows).double().flatten()
    exact = float(before @ after) / max(float(before.norm() * after.norm()), 1e-300)
    assert tally.correlation <= exact + 2.0**-20
    assert (tally.correlation >= blocks.MIN_CORRELATION) == (exact >= blocks.MIN_CORRELATION)


def test_bfloat16_by_way_of_float32_is_the_direct_conversion() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    assert torch.equal(blocks.convert(every, torch.float16), every.to(torch.float16))


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
