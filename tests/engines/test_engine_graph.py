"""engines/engine_graph.py: one position before lm_head, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact.errors import EngineError
from artifact.io_spec import graph_inputs
from artifact.layout import MODULE_KEY
from engines.engine_graph import write_engine_graph
from engines.one_position import gather_last_position
from graphs.diff import compare_graphs

Make = Callable[..., Any]


def feeds(layers: int, *, sequence: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    cache = {f"past_key_values.{i}.{kind}": rng.normal(0, 1, (2, 2, past, 64)).astype(np.float16) for i in range(layers) for kind in ("key", "value")}
    mask = np.ones((2, past + sequence), np.int64)
    mask[1, 0] = 0
    positions = np.tile(np.arange(past, past + sequence), (2, 1))
    return {"input_ids": rng.integers(0, 512, (2, sequence)), "attention_mask": mask, "position_ids": positions, **cache}


def static_feeds(layers: int, *, starts: list[int], sequence: int, last: list[int] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (2, 2, 128, 64)
    cache = {f"past_key_values.{i}.{kind}": rng.normal(0, 1, shape).astype(np.float16) for i in range(layers) for kind in ("key", "value")}
    indices = np.array(starts)
    tokens = {"input_ids": rng.integers(0, 512, (2, sequence)), "position_ids": indices[:, None] + np.arange(sequence)}
    rows = {"cache_write_indices": indices, "key_value_lengths": indices + sequence, **({"last_token_indices": np.array(last)} if last else {})}
    return tokens | rows | cache


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs: list[np.ndarray] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    return outputs


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize(("sequence", "past"), [(5, 0), (3, 4), (1, 6)])
def test_logits_are_the_stages_at_the_last_position(make_stage: Make, tmp_path: Path, precision: str, sequence: int, past: int) -> None:
    stage = make_stage(tmp_path, 1, precision)
    inputs = feeds(1, sequence=sequence, past=past)
    whole, engine = run(stage.path, inputs), run(stage.engine_graph, inputs)
    assert engine[0].shape == (2, 1, 512)
    one_step = 2**-8  # of float16 below 8: a MatMul of another row count may sum in another order
    np.testing.assert_allclose(engine[0], whole[0][:, -1:], rtol=0, atol=one_step)
    for ours, theirs in zip(engine[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("starts", "sequence", "last"), [([0, 0], 9, [8, 3]), ([9, 4], 1, [0, 0]), ([9, 4], 5, [1, 4])])
def test_static_logits_are_the_stages_at_the_position_of_each_row(make_stage: Make, tmp_path: Path, starts, sequence, last) -> None:
    stage = make_stage(tmp_path, 1, "fp16", kv_cache="static")
    whole = run(stage.path, static_feeds(1, starts=starts, sequence=sequence))
    engine = run(stage.engine_graph, static_feeds(1, starts=starts, sequence=sequence, last=last))
    assert engine[0].shape == (2, 1, 512)
    one_step = 2**-8  # of float16 below 8: a MatMul of another row count may sum in another order
    np.testing.assert_allclose(engine[0][:, 0], whole[0][np.arange(2), last], rtol=0, atol=one_step)
    for ours, theirs in zip(engine[1:], whole[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_capacity_is_a_number_in_every_shape(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 2, "fp16", kv_cache="static")
    before, after = ir.load(stage.path), ir.load(stage.engine_graph)
    shapes = [str(value.shape) for value in (*before.graph.inputs, *before.graph.outputs)]
    assert sum("cache_capacity" in shape for shape in shapes) == 8
    expected = [shape.replace("cache_capacity", "128") for shape in shapes]
    names = [value.name for value in after.graph.inputs]
    expected.insert(names.index("key_value_lengths") + 1, "[batch_size]")
    expected[len(names)] = "[batch_size,1,512]"
    assert [str(value.shape) for value in (*after.graph.inputs, *after.graph.outputs)] == expected
    assert [(value.name, str(value.shape)) for value in after.graph.inputs] == [
        (spec.name, f"[{','.join(map(str, spec.shape))}]".replace("cache_capacity", "128"))
        for spec in graph_inputs(stage.config, "fp16", "static", one_position=True)
    ]
    assert "cache_capacity" not in " ".join(str(output.shape) for node in after.graph for output in node.outputs)
    onnx.checker.check_model(stage.engine_graph, full_check=True)


def test_nothing_else_differs_in_a_static_graph(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 2, "fp16", kv_cache="static")
    difference = compare_graphs(ir.load(stage.path), ir.load(stage.engine_graph))
    assert difference.outputs == ["logits"]
    assert len(difference.only_left) == 3  # lm_head, the cast of what it multiplies and that of its sums
    assert len(difference.only_right) == 5  # the index's new axes, the gather, and these behind it


@pytest.mark.parametrize(("kv_cache", "capacity", "words"), [("static", None, "needs a capacity"), ("dynamic", 128, "has no capacity")])
def test_a_capacity_is_for_static_caches(make_stage: Make, tmp_path: Path, kv_cache: str, capacity: int | None, words: str) -> None:
    stage = make_stage(tmp_path, 1, "fp16", kv_cache=kv_cache)
    with pytest.raises(EngineError, match=words):
        write_engine_graph(stage.path, tmp_path / "engine.onnx", capacity=capacity)
    assert not (tmp_path / "engine.onnx").exists()


def test_nothing_else_differs(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 2, "fp16")
    difference = compare_graphs(ir.load(stage.path), ir.load(stage.engine_graph))
    assert difference.outputs == ["logits"]
    assert len(difference.only_left) == 3  # lm_head, the cast of what it multiplies and that of its sums
    assert len(difference.only_right) == 4  # the gather, and these behind it


def test_one_position_is_gathered_before_it_is_cast(make_stage: Make, tmp_path: Path) -> None:
    model = ir.load(make_stage(tmp_path, 1, "fp16").engine_graph)
    gather = next(node for node in model.graph if node.name == "last_position")
    cast = gather.outputs[0].consumers()[0]
    assert gather.inputs[0].producer().op_type == "RMSNormalization"
    assert (cast.op_type, cast.outputs[0].consumers()[0].name) == ("Cast", "node_logits")
    assert cast.outputs[0].dtype == ir.DataType.FLOAT


def test_shapes_and_module_say_what_was_added(make_stage: Make, tmp_path: Path) -> None:
    model = ir.load(make_stage(tmp_path, 1, "fp16").engine_graph)
    gather = next(node for node in model.graph if node.name == "last_position")
    lm_head = gather.outputs[0].consumers()[0]
    assert model.graph.outputs[0].shape == ir.Shape(["batch_size", 1, 512])
    assert gather.metadata_props[MODULE_KEY] == lm_head.metadata_props[MODULE_KEY]
    onnx.checker.check_model(make_stage(tmp_path, 1, "fp16").engine_graph, full_check=True)


def test_external_data_stays_where_it_is(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "fp16")
    before = (tmp_path / "weights/all.bin").stat()
    entries = [
        {tensor.name: tuple((e.key, e.value) for e in tensor.external_data) for tensor in onnx.load(path, load_external_data=False).graph.initializer}
        for path in (stage.path, stage.engine_graph)
    ]
    assert entries[1] == entries[0] | {"last_position": ()}
    after = (tmp_path / "weights/all.bin").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert stage.engine_graph.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(float[B,S,4] x, float[4,8] w) => (float[B,S,8] y) { y = MatMul(x, w) }", "no output 'logits'; it has: y"),
        ("(float[B,4] x, float[4,8] w) => (float[B,8] logits) { logits = Gemm(x, w) }", "must come from one MatMul, got Gemm"),
        ("(float[B,4] x, float[4,8] w) => (float[B,8] logits) { logits = MatMul(x, w) }", r"must be \[B, S, E\], got"),
    ],
)
def test_refuses_another_form(text: str, words: str) -> None:
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]>\ng {text}')
    with pytest.raises(EngineError, match=words):
        gather_last_position(model.graph, "odd.onnx")


def test_goes_back_over_a_cast() -> None:
    text = "(float16[B,S,4] x, float16[4,8] w) => (float[B,S,8] logits) { y = MatMul(x, w)\n logits = Cast<to = 1>(y) }"
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]>\ng {text}')
    gather_last_position(model.graph, "cast.onnx")
    assert [node.op_type for node in model.graph] == ["Gather", "MatMul", "Cast"]
    assert model.graph.outputs[0].shape == ir.Shape(["B", 1, 8])
