from __future__ import annotations

import numpy as np
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import rms_norm
from graphs.rewriting import apply_fusion

FLOAT32 = """
agraph (float[B,S,8] x, float[8] weight) => (float[B,S,8] y)
<float two = {2}, int64[1] axes = {-1}, float epsilon = {0.001}>
{
    squares = Pow(x, two)
    [mean] mean = ReduceMean<keepdims=1>(squares, axes)
    variance = Add(mean, epsilon)
    root = Sqrt(variance)
    inverse = Reciprocal(root)
    normed = Mul(x, inverse)
    [last] y = Mul(weight, normed)
}
"""
FLOAT16 = """
agraph (float16[B,S,8] x, float16[8] weight) => (float16[B,S,8] y)
<float two = {2}, int64[1] axes = {-1}, float epsilon = {0.001}>
{
    x32 = Cast<to=1>(x)
    squares = Pow(x32, two)
    [mean] mean = ReduceMean<keepdims=1>(squares, axes)
    variance = Add(mean, epsilon)
    root = Sqrt(variance)
    inverse = Reciprocal(root)
    normed = Mul(x32, inverse)
    rounded = Cast<to=10>(normed)
    [last] y = Mul(weight, rounded)
}
"""


@pytest.mark.parametrize(
    ("text", "dtype", "rtol"),
    [(FLOAT32, np.float32, 1e-6), (FLOAT16, np.float16, 2**-10)],  # float16: one rounding, where the float32 sum's last bit differs
    ids=["float32", "float16"],
)
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, text, dtype, rtol) -> None:
    model = graph(text)
    feeds = {"x": 3 * random(2, 5, 8, dtype=dtype), "weight": random(8, dtype=dtype)}
    unfused_y = run(model, feeds)[0]
    result = apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    assert (result.fired, result.refused) == (1, [])
    (node,) = model.graph
    assert node.op_type == "RMSNormalization"
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"axis": -1, "epsilon": pytest.approx(0.001), "stash_type": 1}
    assert [value.name for value in node.inputs] == ["x", "weight"]
    fused_y = run(model, feeds)[0]
    assert fused_y.dtype == dtype
    np.testing.assert_allclose(fused_y, unfused_y, rtol=rtol)


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        (FLOAT32, "Mul(weight, normed)", "Mul(normed, weight)"),
        (FLOAT16, "Mul(weight, rounded)", "Mul(rounded, weight)"),
        (FLOAT32, "Mul(x, inverse)", "Mul(inverse, x)"),
        (FLOAT16, "Mul(x32, inverse)", "Mul(inverse, x32)"),
        (FLOAT32, "Add(mean, epsilon)", "Add(epsilon, mean)"),
        (FLOAT16, "axes = {-1}", "axes = {2}"),
    ],
)
def test_fuses_every_order_of_operands(graph, text, before, after) -> None:
    assert before in text
    model = graph(text.replace(before, after))
    assert apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate).fired == 1
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]


def test_keeps_the_module(graph) -> None:
    model = graph(FLOAT16)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.3.input_layernorm"
    apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    assert [node.metadata_props[MODULE_KEY] for node in model.graph] == ["model.layers.3.input_layernorm"]


def test_computes_float16_statistics_in_float32(graph, run) -> None:
    """300² overflows float16: a norm that squares in float16 would give 0."""
    model = graph(FLOAT16)
    apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    y = run(model, {"x": np.full((1, 1, 8), 300, np.float16), "weight": np.ones(8, np.float16)})[0]
    np.testing.assert_array_equal(y, np.ones((1, 1, 8), np.float16))


@pytest.mark.parametrize(
    ("text", "before", "after", "reason"),
    [
        (FLOAT32, "two = {2}", "two = {3}", "the values are not squared"),
        (FLOAT32, "float epsilon = {0.001}", "float[2] epsilon = {0.001, 0.001}", "epsilon is not a constant number"),
        (FLOAT32, "int64[1] axes = {-1}", "int64[2] axes = {-1, -2}", "the mean is not taken over the last axis"),
        (FLOAT32, "axes = {-1}", "axes = {1}", "the mean is not taken over the last axis"),
        (FLOAT32, "keepdims=1", "keepdims=0", "the mean drops its axis"),
        (FLOAT32, "float[8] weight", "float[1] weight", "the weight is not a vector over the last axis"),
        (FLOAT32, "float[8] weight", "float[S,8] weight", "the weight is not a vector over the last axis"),
        (FLOAT16, "Cast<to=1>", "Cast<to=11>", "it computes in DOUBLE, not in FLOAT"),
        (FLOAT16, "Cast<to=10>", "Cast<to=16>", "the result is cast to BFLOAT16, the input is FLOAT16"),
        (FLOAT32, "inverse = Recip", "[odd] inverse = Exp(root)\n    unread = Recip", "its structure differs: odd is Exp, expected Reciprocal"),
        (FLOAT32, "=> (float[B,S,8] y)", "=> (float[B,S,8] y, float[B,S,8] normed)", "a value between its first and last node is used elsewhere too"),
    ],
)
def test_refuses_with_a_reason(graph, text, before, after, reason) -> None:
    assert before in text
    model = graph(text.replace(before, after))
    result = apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    assert result.fired == 0
    assert "RMSNormalization" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == "mean"
    assert reason in refusal.reason


def test_refuses_float16_without_upcast(graph) -> None:
    """Fusing it would silently compute in float32, and hide an overflow that the graph has."""
    header = "agraph (float16[B,S,8] x, float16[8] weight, float16 two, float16 epsilon) => (float16[B,S,8] y)\n<int64[1] axes = {-1}>\n"
    constants = {"two": np.array(2, np.float16), "epsilon": np.array(0.001, np.float16)}
    model = graph(header + FLOAT32[FLOAT32.index("{\n") :], constants=constants)
    result = apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    assert result.fired == 0
    assert "it computes in FLOAT16 without a cast to FLOAT" in result.refused[0].reason


def test_refuses_epsilon_that_is_fed(graph) -> None:
    model = graph(FLOAT32.replace("float[8] weight)", "float[8] weight, float fed)").replace("Add(mean, epsilon)", "Add(mean, fed)"))
    assert "epsilon is not a constant number" in apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate).refused[0].reason


def test_refuses_axes_that_are_fed(graph) -> None:
    text = FLOAT32.replace("float[8] weight)", "float[8] weight, int64[1] fed)").replace("(squares, axes)", "(squares, fed)")
    assert "the mean is not taken over the last axis" in apply_fusion(graph(text), rms_norm.RULES, rms_norm.is_candidate).refused[0].reason


def test_a_mean_keeps_its_axis_if_nothing_is_said(graph) -> None:
    assert apply_fusion(graph(FLOAT32.replace("<keepdims=1>", "")), rms_norm.RULES, rms_norm.is_candidate).fired == 1
