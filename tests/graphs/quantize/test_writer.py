"""graphs/quantize/writer.py: one file a layer, one module in memory at a time, and bytes that a graph can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from artifact.errors import QuantizationError
from artifact.hashing import sha256_of
from artifact.steps import StepContext
from artifact.tensor_file import read_checksums
from graphs.quantize.writer import Piece, add_initializer, exact_rows, read_mapped, row_blocks, write_pieces


def piece(module: str, array: np.ndarray, made: list[str]) -> Piece:
    def make() -> Iterator[np.ndarray]:
        made.append(module)
        yield array

    return Piece(module, {f"{module}.levels": ("I8", array.shape)}, make)


def test_writes_layers_in_order_then_the_rest_and_makes_each_piece_when_its_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []
    arrays = {
        name: np.full((2, 3), index, np.int8) for index, name in enumerate(("lm_head", "model.layers.10.a", "model.layers.2.b", "model.layers.2.a"))
    }
    step = StepContext(tmp_path)
    stored = write_pieces(step, "x", [piece(name, array, made) for name, array in arrays.items()])
    assert made == ["model.layers.2.b", "model.layers.2.a", "model.layers.10.a", "lm_head"]
    files = ["weights/x-layer-002.safetensors", "weights/x-layer-010.safetensors", "weights/x-shared.safetensors"]
    assert list(step.outputs) == [*files, "weights/x-checksums.json"]
    assert read_checksums(tmp_path, "weights/x-checksums.json") == stored
    for name, array in arrays.items():
        np.testing.assert_array_equal(load_file(tmp_path / stored[f"{name}.levels"].file)[f"{name}.levels"], array)


def test_a_file_is_not_read_again_for_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr("artifact.manifest.sha256_of", lambda path: read.append(path.name) or "")
    step = StepContext(tmp_path)
    write_pieces(step, "x", [piece("model.layers.0.a", np.ones((2, 3), np.int8), [])])
    assert read == ["x-checksums.json"]
    file = "weights/x-layer-000.safetensors"
    assert step.outputs[file]["sha256"] == sha256_of(tmp_path / file)


def test_rows_of_a_mapped_weight_leave_memory_when_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[np.ndarray] = []
    monkeypatch.setattr("graphs.quantize.writer.forget", left.append)
    weight = np.arange(12, dtype=np.float16).reshape(4, 3)
    exact_rows(weight, "w", slice(1, 3))
    (rows,) = left
    assert np.shares_memory(rows, weight)
    np.testing.assert_array_equal(rows, weight[1:3])


def test_an_initializer_reads_what_was_stored_in_another_shape(tmp_path: Path) -> None:
    stored = write_pieces(StepContext(tmp_path), "x", [piece("model.layers.0.a", np.array([[0x10, 0x32]], np.int8), [])])
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    value = add_initializer(graph, stored["model.layers.0.a.levels"], ir.DataType.INT4, (1, 4))
    assert graph.initializers["model.layers.0.a.levels"] is value
    np.testing.assert_array_equal(read_mapped(value, tmp_path, lambda levels: levels.astype(np.int8)), [[0, 1, 2, 3]])


def test_rows_come_in_blocks_of_float32_and_the_first_that_is_not_finite_is_named() -> None:
    weight = np.arange(20, dtype=np.float16).reshape(5, 4)
    found = list(row_blocks(weight, "w", values=8))
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 2), (2, 4), (4, 5)]
    assert {block.dtype for _, block in found} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), weight)
    weight[3, 1] = np.inf
    with pytest.raises(QuantizationError, match=r"w\.weight holds NaN or Inf in rows 2 … 3"):
        list(row_blocks(weight, "w", values=8))
