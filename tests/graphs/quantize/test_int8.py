"""graphs/quantize/int8.py: which linears, which bytes, which numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors import safe_open

from artifact.errors import QuantizationError
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext
from artifact.tensor_file import plan_tensors, write_tensors
from graphs.quantize.int8 import quantize_int8
from graphs.quantize.linears import find_linears

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float16[B,8] x) => (float16[B,6] y)
<float16[8,8] first, float16[6,8] head>
{
    t = Transpose<perm=[1,0]>(first)
    a = MatMul(x, t)
    u = Transpose<perm=[1,0]>(head)
    y = MatMul(a, u)
}"""
NAMES = {"first": "model.layers.0.self_attn.o_proj.weight", "head": "lm_head.weight"}


def artifact(folder: Path, *, bad: bool = False) -> StepContext:
    """A folder with a two-linear fused.onnx over external weights."""
    rng = np.random.default_rng(0)
    weights = {NAMES["first"]: rng.standard_normal((8, 8)).astype(np.float16), NAMES["head"]: rng.standard_normal((6, 8)).astype(np.float16)}
    weights[NAMES["first"]][2] = 0  # a row of zeros has no scale of its own
    if bad:
        weights[NAMES["first"]][5, 1] = np.inf
    header, planned = plan_tensors("weights/x.safetensors", {name: ("F16", array.shape) for name, array in weights.items()})
    (folder / "weights").mkdir(parents=True)
    stored = write_tensors(folder / "weights" / "x.safetensors", header, planned, (memoryview(array).cast("B") for array in weights.values()))
    model = ir.from_onnx_text(GRAPH)
    for value in [value for node in model.graph for value in node.inputs if value is not None and value.name in NAMES]:
        value.name = NAMES[str(value.name)]
        tensor = next(tensor for tensor in stored if tensor.name == value.name)
        value.const_value = ir.ExternalTensor(
            tensor.file, tensor.offset, tensor.length, ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape), name=tensor.name, base_dir=folder
        )
        model.graph.initializers.add(value)
    for node, module in zip(model.graph, ["model.layers.0.self_attn.o_proj"] * 2 + ["lm_head"] * 2, strict=True):
        node.metadata_props[MODULE_KEY] = module
    ir.save(model, folder / "fused.onnx")
    return StepContext(folder)


def test_layer_linears_are_quantised_and_lm_head_is_kept(tmp_path: Path) -> None:
    step = artifact(tmp_path)
    report = quantize_int8(step)
    assert (report["linears"], report["quantized"]) == (2, 1)
    assert [kept["name"] for kept in report["kept"]] == ["model.embed_tokens", "lm_head"]
    assert report["bytes"] == 8 * 8 + 8 * 2
    model = ir.load(tmp_path / "int8.onnx")
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert dequantize.attributes.get_int("axis") == 1
    assert [user.op_type for user in dequantize.outputs[0].consumers()] == ["MatMul"]  # a transpose is copied by the compiler
    assert dequantize.metadata_props[MODULE_KEY] == "model.layers.0.self_attn.o_proj"
    assert [value.dtype for value in dequantize.inputs if value is not None] == [ir.DataType.INT8, ir.DataType.FLOAT16]
    assert NAMES["first"] not in model.graph.initializers
    assert {tensor["file"] for tensor in json.loads((tmp_path / "weights" / "int8-checksums.json").read_text()).values()} == {
        "weights/int8-layer-000.safetensors"
    }


def test_quantised_graph_computes_with_the_dequantised_weights(tmp_path: Path) -> None:
    quantize_int8(artifact(tmp_path))
    with safe_open(tmp_path / "weights" / "int8-layer-000.safetensors", "np") as file:
        levels, scale = file.get_tensor(NAMES["first"] + "_int8_t"), file.get_tensor(NAMES["first"] + "_scale")
    with safe_open(tmp_path / "weights" / "x.safetensors", "np") as file:
        head = file.get_tensor(NAMES["head"]).astype(np.float32)
    x = np.random.default_rng(3).standard_normal((3, 8)).astype(np.float16)
    expected = x.astype(np.float32) @ (levels * scale.astype(np.float32)) @ head.T
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    assert np.abs(got - expected).max() <= 4e-3 * np.abs(expected).max()
    original = onnxruntime.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert 0 < np.abs(got - original).max() <= 0.05 * np.abs(original).max()


def test_second_quantisation_is_refused(tmp_path: Path) -> None:
    step = artifact(tmp_path)
    quantize_int8(step)
    (tmp_path / "int8.onnx").replace(tmp_path / "fused.onnx")
    with pytest.raises(QuantizationError, match="quantised already"):
        quantize_int8(step)


def test_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"o_proj\.weight holds NaN or Inf"):
        quantize_int8(artifact(tmp_path, bad=True))
    assert not (tmp_path / "int8.onnx").exists()


def test_graph_without_layer_linears_is_refused(tmp_path: Path) -> None:
    step = artifact(tmp_path)
    model = ir.load(tmp_path / "fused.onnx")
    model.graph.initializers[NAMES["first"]].name = "something.weight"  # a linear, but in no layer
    ir.save(model, tmp_path / "fused.onnx")
    with pytest.raises(QuantizationError, match="no MatMul by a constant weight"):
        quantize_int8(step)


def test_linears_are_found_by_form_not_by_name(tmp_path: Path) -> None:
    artifact(tmp_path)
    names = [linear.name for linear in find_linears(ir.load(tmp_path / "fused.onnx").graph)]
    assert names == ["model.layers.0.self_attn.o_proj", "lm_head"]
