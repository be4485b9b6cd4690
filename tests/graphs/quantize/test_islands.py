"""graphs/quantize/islands.py: the form of W8A8, and that PyTorch, ONNX's reference evaluator, ONNX Runtime and strict mode compute it alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from artifact.errors import QuantizationError
from artifact.layout import MODULE_KEY
from graphs.fusions import accumulate
from graphs.fusions._reading import apply_reader
from graphs.quantize.int8 import FORM
from graphs.quantize.islands import Islands
from graphs.quantize.linears import find_linears, site_of
from graphs.quantize.rounding import round_plainly
from validation.graph_interface import SESSION_ENTRIES
from validation.strict import run_strict

IN, OUT = 64, 24
ATTENTION = "model.layers.0.self_attn"
HEADER = '<ir_version: 11, opset_import: ["" : 23]>'
GRAPH = """
g (DTYPE[B,S,64] x, DTYPE[24,64] q, DTYPE[24,64] k) => (DTYPE[B,S,24] y_q, DTYPE[B,S,24] y_k)
{
    t_q = Transpose<perm=[1,0]>(q)
    y_q = MatMul(x, t_q)
    t_k = Transpose<perm=[1,0]>(k)
    y_k = MatMul(x, t_k)
}"""
STEP = 0.03
"""Activation scale: the largest inputs are beyond 127 of it and are clipped."""


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels [out, in] and scales [out] float32."""
    levels, scale = round_plainly(weight.astype(np.float32), FORM.grid("", weight.shape[1], np.dtype(np.float32)))
    return levels, scale[:, 0]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal((OUT, IN)) * np.exp(rng.standard_normal((OUT, 1)))).astype(np.float16) for name in "qk"}


def inputs() -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 5, IN)).astype(np.float16)
    x[0, 0, 3] = 40  # a spike, clipped
    return x


def model_of(dtype: str = "float16", *, wide: bool = True) -> ir.Model:
    """Two linears of one input, float16 with float32 sums as the fusions leave them."""
    model = ir.from_onnx_text(HEADER + GRAPH.replace("DTYPE", {"float32": "float"}.get(dtype, dtype)))
    for name, array in weights().items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.name = f"{ATTENTION}.{name}_proj.weight"
        value.const_value = ir.tensor(array.astype(dtype), name=value.name)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        node.metadata_props[MODULE_KEY] = ATTENTION
    if wide and dtype == "float16":
        apply_reader(model, accumulate)
    return model


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.initializers.add(value)
    return value


def quantised(dtype: str = "float16", step: float = STEP) -> tuple[ir.Model, dict[str, tuple[np.ndarray, np.ndarray]]]:
    model, stored = model_of(dtype), {}
    islands = Islands(model.graph)
    for linear in list(find_linears(model.graph)):
        assert linear.weight.const_value is not None
        levels, scale = quantize_rows(linear.weight.const_value.numpy())
        stored[linear.name] = levels, scale
        islands.put(linear, step, constant(model, f"{linear.name}.weight_int8", levels), constant(model, f"{linear.name}.weight_scale", scale))
    return model, stored


def run_ort(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": x})]


def run_torch(x: np.ndarray, stored: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """PyTorch's own fake quantisation of the input, and a product of what both dequantise to."""
    rounded = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x).float(), STEP, 0, -128, 127)
    products = [rounded @ (torch.from_numpy(levels).float() * torch.from_numpy(scale)[:, None]).T for levels, scale in stored.values()]
    return [product.numpy().astype(x.dtype) for product in products]


def in_integers(x: np.ndarray, stored: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """What the engine's kernels do: sums of integers, one product with both scales in float32."""
    levels_x = np.clip(np.rint(x.astype(np.float32) / np.float32(STEP)), -128, 127).astype(np.int64)
    sums = [levels_x @ levels.T.astype(np.int64) for levels, _ in stored.values()]
    scales = [scale * np.float32(STEP) for _, scale in stored.values()]
    return [(total.astype(np.float32) * scale).astype(x.dtype) for total, scale in zip(sums, scales, strict=True)]


def test_two_linears_of_one_input_share_its_rounding() -> None:
    model, _ = quantised()
    operators = [node.op_type for node in model.graph]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("DequantizeLinear") == 3  # of the input, and of two weights
    assert operators.count("Cast") == 3  # the input to float32 once, two results to float16
    assert {name.removeprefix(f"{ATTENTION}.") for name in model.graph.initializers} == {
        "q_proj.weight_int8", "q_proj.weight_scale", "k_proj.weight_int8", "k_proj.weight_scale", "qkv_proj.activation_scale", "int8_zero_point",
    }  # fmt: skip
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    assert [value.dtype for value in quantize.inputs if value is not None] == [ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT8]
    assert quantize.metadata_props[MODULE_KEY] == ATTENTION
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for node in products for value in node.inputs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_runtime_computes_the_same(dtype: str) -> None:
    model, stored = quantised(dtype)
    x = inputs().astype(dtype)
    expected = run_torch(x, stored)
    reference = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    strict: Any = run_strict(model, {"x": x}).outputs
    one_rounding = 2**-10 if dtype == "float16" else 2**-20
    for name, ours in {"onnx": reference, "onnxruntime": run_ort(model, x), "strict": [strict["y_q"], strict["y_k"]]}.items():
        for got, wanted in zip(ours, expected, strict=True):
            assert np.abs(got.astype(np.float64) - wanted).max() <= one_rounding * np.abs(wanted).max(), name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strict_mode_adds_up_integers_as_the_kernels_do(dtype: str) -> None:
    model, stored = quantised(dtype)
    x = inputs().astype(dtype)
    outputs = run_strict(model, {"x": x}).outputs
    for got, exact in zip([outputs["y_q"], outputs["y_k"]], in_integers(x, stored), strict=True):
        np.testing.assert_array_equal(got, exact)
    assert any(node.op_type == "MatMul" for node in model.graph)  # the graph that was given is left alone


def test_input_beyond_the_scale_is_clipped_and_not_wrapped() -> None:
    model, _ = quantised()
    x = inputs()
    clipped = x.copy()
    clipped[0, 0, 3] = 127 * STEP
    for got, wanted in zip(run_ort(model, x), run_ort(model, clipped), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_refuses_a_linear_that_adds_up_in_float16() -> None:
    model = model_of(wide=False)
    linear = next(find_linears(model.graph))
    levels = constant(model, "levels", np.zeros((OUT, IN), np.int8))
    scale = constant(model, "scale", np.ones(OUT, np.float32))
    with pytest.raises(QuantizationError, match="q_proj adds up in float16"):
        Islands(model.graph).put(linear, 1.0, levels, scale)


def test_float_weight_that_something_else_reads_stays() -> None:
    model = model_of()
    linear = next(find_linears(model.graph))
    name = str(linear.weight.name)
    other = ir.node("Identity", [linear.weight])
    model.graph.append(other)
    levels, scale = quantize_rows(weights()["q"])
    Islands(model.graph).put(linear, STEP, constant(model, "levels", levels), constant(model, "scale", scale))
    assert name in model.graph.initializers


def test_names_tell_the_site() -> None:
    assert site_of(f"{ATTENTION}.q_proj") == f"{ATTENTION}.qkv_proj"
    assert f"{ATTENTION}.qkv_proj.QuantizeLinear" in {node.name for node in quantised()[0].graph}
