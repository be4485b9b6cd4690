from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions import foreign_rms_norm
from graphs.fusions._reading import apply_reader

HEAD = "agraph (float[B,S,8] x, float[8] weight) => (float[B,S,8] y)\n"
CONSTANTS = "<float two = {2}, int64[1] axes = {-1}, float epsilon = {0.001}, float one = {1}, float minus_half = {-0.5}>\n"
START = "{ squares = Pow(x, two)\n [mean] mean = ReduceMean<keepdims=1>(squares, axes)\n variance = Add(mean, epsilon)\n"
ENDS = {
    "reciprocal": "root = Sqrt(variance)\n inverse = Reciprocal(root)\n normed = Mul(x, inverse)\n y = Mul(weight, normed) }",
    "one-over-root": "root = Sqrt(variance)\n inverse = Div(one, root)\n normed = Mul(x, inverse)\n y = Mul(weight, normed) }",
    "x-over-root": "root = Sqrt(variance)\n normed = Div(x, root)\n y = Mul(weight, normed) }",
    "power": "inverse = Pow(variance, minus_half)\n normed = Mul(x, inverse)\n y = Mul(weight, normed) }",
}
TEXTS = {name: HEAD + CONSTANTS + START + end for name, end in ENDS.items()}
PLAIN = TEXTS["x-over-root"]
FLOAT16 = """
agraph (float16[B,S,8] x, float16[8] weight) => (float16[B,S,8] y)
<float two = {2}, int64[1] axes = {-1}, float epsilon = {0.001}>
{
    x32 = Cast<to=1>(x)
    squares = Pow(x32, two)
    [mean] mean = ReduceMean<keepdims=1>(squares, axes)
    variance = Add(mean, epsilon)
    root = Sqrt(variance)
    normed = Div(x32, root)
    rounded = Cast<to=10>(normed)
    y = Mul(weight, rounded)
}
"""


@pytest.fixture
def norm(graph, random):
    """A graph of text with a stored weight and with shapes."""

    def make(text, dtype=np.float32):
        weight = {"weight": random(8, dtype=dtype)} if "[8] weight)" in text else {}
        model = graph(text, constants=weight)
        return common_passes.ShapeInferencePass()(model).model

    return make


def fuse(model):
    return apply_reader(model, foreign_rms_norm)


@pytest.mark.parametrize("spelling", TEXTS)
@pytest.mark.parametrize(
    ("before", "after"),
    [("Mul(weight, normed)", "Mul(weight, normed)"), ("Mul(weight, normed)", "Mul(normed, weight)"), ("Pow(x, two)", "Mul(x, x)"),
     ("Add(mean, epsilon)", "Add(epsilon, mean)"), ("Mul(x, inverse)", "Mul(inverse, x)"), ("axes = {-1}", "axes = {2}"), ("<keepdims=1>", "")],
)  # fmt: skip
def test_fuses_every_spelling_and_keeps_the_numbers(norm, run, random, spelling, before, after) -> None:
    model = norm(TEXTS[spelling].replace(before, after))
    feeds = {"x": 3 * random(2, 5, 8)}
    unfused_y = run(model, feeds)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    (node,) = model.graph
    assert node.op_type == "RMSNormalization"
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"axis": -1, "epsilon": pytest.approx(0.001), "stash_type": 1}
    assert [value.name for value in node.inputs] == ["x", "weight"]
    assert node.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, feeds)[0], unfused_y, rtol=1e-6)


def test_fuses_float16_with_casts(norm, run, random) -> None:
    model = norm(FLOAT16, np.float16)
    feeds = {"x": random(2, 5, 8, dtype=np.float16)}
    unfused_y = run(model, feeds)[0]
    assert fuse(model).fired == 1
    assert [(node.op_type, node.inputs[0].name) for node in model.graph] == [("RMSNormalization", "x")]
    np.testing.assert_allclose(run(model, feeds)[0], unfused_y, rtol=2**-10)


@pytest.mark.parametrize(
    ("text", "before", "after", "reason"),
    [
        (PLAIN, "two = {2}", "two = {3}", "the mean is not one of squares"),
        (PLAIN, "Pow(x, two)", "Mul(x, epsilon)", "the mean is not one of squares"),
        (PLAIN, "axes = {-1}", "axes = {1}", "the mean is not taken over the last axis"),
        (PLAIN, "int64[1] axes = {-1}", "int64[2] axes = {-1, -2}", "the mean is not taken over the last axis"),
        (PLAIN, "keepdims=1", "keepdims=0", "the mean drops its axis"),
        (PLAIN, "ReduceMean<keepdims=1>(squares, axes)", "ReduceMean<keepdims=1>(squares)", "the mean is not taken over the last axis"),
        (PLAIN, "(squares, axes)", "(squares, fed)", "the mean is not taken over the last axis"),
        (TEXTS["reciprocal"], "normed = Mul(x, inverse)", "normed = Add(x, inverse)", "the values are not divided by the root of their variance"),
        (PLAIN, "Mul(weight, normed)", "Mul(epsilon, normed)", "the result is not multiplied by a weight"),
        (PLAIN, "Mul(weight, normed)", "Mul(normed, normed)", "the result is not multiplied by a weight"),
        (PLAIN, "variance = Add(mean, epsilon)", "variance = Add(mean, mean)", "no constant epsilon is added"),
        (PLAIN, "root = Sqrt(variance)", "root = Exp(variance)", "no root of the variance is taken"),
        (PLAIN, "Div(x, root)", "Div(weight, root)", "the values are not divided by the root of their variance"),
        (TEXTS["one-over-root"], "one = {1}", "one = {2}", "the values are not divided by the root of their variance"),
        (TEXTS["power"], "{-0.5}", "{-1}", "no root of the variance is taken"),
        (TEXTS["reciprocal"], "Mul(x, inverse)", "Mul(weight, inverse)", "what is divided by the root is not what was squared"),
        (PLAIN, "Mul(weight, normed)", "Add(weight, normed)", "the result is not multiplied by a weight"),
        (PLAIN, "float[8] weight)", "float[8] weight )", "the result is not multiplied by a weight"),  # fed, not stored
        (FLOAT16, "Cast<to=1>(x)", "Cast<to=11>(x)", "without a cast to FLOAT"),
        (PLAIN, "float[8] weight)", "float[S,8] weight)", "the result is not multiplied by a weight"),
    ],
)
def test_refuses_with_a_reason(norm, text, before, after, reason) -> None:
    assert before in text
    changed = text.replace(before, after)
    model = norm(changed.replace("float[8] weight)", "float[8] weight, int64[1] fed)") if "fed" in after else changed)
    result = fuse(model)
    assert result.fired == 0
    assert "RMSNormalization" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == "mean"
    assert reason in refusal.reason


def test_refuses_float16_without_upcast(graph, random) -> None:
    """Fusing it would silently compute in float32, and hide an overflow that the graph has."""
    text = "agraph (float16[B,S,8] x, float16[8] weight, float16 two, float16 epsilon) => (float16[B,S,8] y)\n<int64[1] axes = {-1}>\n"
    constants = {"two": np.array(2, np.float16), "epsilon": np.array(0.001, np.float16), "weight": random(8, dtype=np.float16)}
    model = graph(text + START + ENDS["x-over-root"], constants=constants)
    result = fuse(common_passes.ShapeInferencePass()(model).model)
    assert result.fired == 0
    assert "it computes in FLOAT16 without a cast to FLOAT" in result.refused[0].reason


WIDE_INPUT = HEAD.replace("float[8] weight", "float16[8] weight").replace("(float[B,S,8] y)", "(float16[B,S,8] y)") + CONSTANTS + START
WIDE_INPUT += "root = Sqrt(variance)\n normed = Div(x, root)\n rounded = Cast<to=10>(normed)\n y = Mul(weight, rounded) }"


def test_a_float32_input_of_a_float16_weight_is_rounded_once(norm, run, random) -> None:
    model = norm(WIDE_INPUT, np.float16)
    weight = model.graph.initializers["weight"].const_value.numpy().astype(np.float64)
    x = 300 * random(2, 5, 8)
    unfused_y = run(model, {"x": x})[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    widened, node, narrowed = model.graph
    assert (widened.op_type, widened.inputs[0].name, widened.outputs[0].dtype, widened.outputs[0].shape) == ("Cast", "weight", 1, [8])
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"axis": -1, "epsilon": pytest.approx(0.001), "stash_type": 1}
    assert [value.name for value in node.inputs] == ["x", widened.outputs[0].name]
    assert (node.outputs[0].dtype, narrowed.op_type, narrowed.attributes["to"].value, narrowed.outputs[0].name) == (1, "Cast", 10, "y")
    fused_y = run(model, {"x": x})[0]
    assert (fused_y.dtype, unfused_y.dtype) == (np.float16, np.float16)
    exact = x * weight / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 0.001)
    assert np.abs(fused_y - exact).mean() <= np.abs(unfused_y - exact).mean()


def test_refuses_a_float32_input_that_is_rounded_to_another_dtype(norm) -> None:
    text = WIDE_INPUT.replace("to=10", "to=16").replace("float16[8]", "bfloat16[8]").replace("(float16[B,S,8] y)", "(bfloat16[B,S,8] y)")
    result = fuse(common_passes.ShapeInferencePass()(norm(text.replace("bfloat16[8] weight)", "bfloat16[8] weight )"))).model)
    assert result.fired == 0
    assert "the result is BFLOAT16 when the weight is applied, the input is FLOAT" in result.refused[0].reason


IN_FLOAT32 = FLOAT16.replace("rounded = Cast<to=10>(normed)", "scaled = Mul(weight, normed)").replace(
    "y = Mul(weight, rounded)", "y = Cast<to=10>(scaled)"
)
CASTS_WEIGHT = IN_FLOAT32.replace("scaled = Mul(weight,", "weight32 = Cast<to=1>(weight)\n    scaled = Mul(weight32,")


@pytest.mark.parametrize(("text", "dtype"), [(IN_FLOAT32.replace("float16[8]", "float[8]"), np.float32), (CASTS_WEIGHT, np.float16)])
def test_a_weight_that_is_applied_in_float32_stays_in_float32(graph, run, random, text, dtype) -> None:
    """As older transformers do: the result is rounded once, behind the weight. The casts stay, and the numbers with them."""
    model = common_passes.ShapeInferencePass()(graph(text, constants={"weight": random(8, dtype=dtype)})).model
    feeds = {"x": random(2, 5, 8, dtype=np.float16)}
    unfused_y = run(model, feeds)[0]
    assert fuse(model).fired == 1
    assert {node.op_type for node in model.graph} == {"Cast", "RMSNormalization"}
    (node,) = (node for node in model.graph if node.op_type == "RMSNormalization")
    assert node.inputs[0].name == "x32"
    np.testing.assert_array_equal(run(model, feeds)[0], unfused_y)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (FLOAT16.replace("Cast<to=10>(normed)", "Cast<to=16>(normed)"), "the result is BFLOAT16 when the weight is applied, the input is FLOAT16"),
        (IN_FLOAT32, "the weight is FLOAT16, what it is applied to is FLOAT"),
    ],
)
def test_refuses_other_dtypes(graph, random, text, reason) -> None:
    model = graph(text, constants={"weight": random(8, dtype=np.float16)})
    for node in model.graph:  # no operator mixes dtypes: inference would refuse such a graph
        node.outputs[0].type = ir.TensorType(ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT)))
        node.outputs[0].shape = ir.Shape(["B", "S", 8])
    assert reason in fuse(model).refused[0].reason
