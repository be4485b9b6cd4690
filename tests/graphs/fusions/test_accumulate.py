from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs import contract
from graphs.fusions import accumulate
from graphs.fusions._reading import apply_reader
from graphs.passes import Fusion, run_passes

TRANSPOSED = """
agraph (float16[B,S,64] x, float16[5,64] weight) => (float16[B,S,5] y)
{ turned = Transpose<perm = [1, 0]>(weight) [linear] y = MatMul(x, turned) }
"""
IN_OUT = """
agraph (float16[B,S,64] x, float16[64,5] weight) => (float16[B,S,5] y)
{ [linear] y = MatMul(x, weight) }
"""
DEQUANTISED = """
agraph (float16[B,S,64] x, int8[5,64] weight, float16[5] steps) => (float16[B,S,5] y)
{ real = DequantizeLinear<axis = 0>(weight, steps) turned = Transpose<perm = [1, 0]>(real) [linear] y = MatMul(x, turned) }
"""
BIASED = """
agraph (float16[S,64] x, float16[5,64] weight, float16[5] bias) => (float16[S,5] y)
{ [linear] y = Gemm<transB = 1>(x, weight, bias) }
"""
PASSED_ON = """
agraph (float16[B,S,64] x, float16[64,5] weight) => (float16[B,S,5] y)
{ same = Identity(weight) [linear] y = MatMul(x, same) }
"""
STORED_WIDE = """
agraph (float16[B,S,64] x, float[64,5] weight) => (float16[B,S,5] y)
{ half = Cast<to = 10>(weight) [linear] y = MatMul(x, half) }
"""
STEP = 2**-7  # every quantised weight is a float16
FORMS = {
    "passed-on": PASSED_ON,
    "transposed": TRANSPOSED,
    "in-out": IN_OUT,
    "dequantised": DEQUANTISED,
    "gemm": BIASED,
    "stored-float32": STORED_WIDE,
}


def stored(form, random):
    weights = {"weight": random(5, 64, dtype=np.float16), "bias": random(5, dtype=np.float16)}
    in_out = {"weight": weights["weight"].T.copy()}
    return {
        "in-out": in_out,
        "passed-on": in_out,
        "stored-float32": {"weight": weights["weight"].T.astype(np.float32)},
        "dequantised": {"weight": (weights["weight"] * 20).astype(np.int8), "steps": np.full(5, STEP, np.float16)},
        "gemm": weights,
    }.get(form, {"weight": weights["weight"]})


def exact(form, x, weights):
    """What the linear multiplies, in float64."""
    weight = weights["weight"].astype(np.float64) * (STEP if form == "dequantised" else 1)
    turned = weight if form in {"in-out", "stored-float32", "passed-on"} else weight.T
    return x.astype(np.float64) @ turned + weights.get("bias", np.zeros(5)).astype(np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_casts_what_enters_and_the_sum_and_keeps_names(graph, random, form) -> None:
    model = graph(FORMS[form], stored=stored(form, random))
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.0.mlp.down_proj"
    result = apply_reader(model, accumulate)
    assert (result.fired, result.refused) == (1, [])
    linear = next(node for node in model.graph if node.op_type in accumulate.LINEARS)
    assert linear.name == "linear"
    assert [(value.producer().op_type, value.producer().attributes.get_int("to"), value.dtype) for value in linear.inputs] == [
        ("Cast", ir.DataType.FLOAT, ir.DataType.FLOAT)
    ] * len(linear.inputs)
    (narrow,) = linear.outputs[0].consumers()
    assert (narrow.op_type, narrow.attributes.get_int("to")) == ("Cast", ir.DataType.FLOAT16)
    assert (linear.outputs[0].dtype, linear.outputs[0].shape) == (ir.DataType.FLOAT, narrow.outputs[0].shape)
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", ir.DataType.FLOAT16)]
    assert model.graph.outputs[0] is narrow.outputs[0]
    assert {node.metadata_props.get(MODULE_KEY) for node in model.graph} == {"model.layers.0.mlp.down_proj"}
    assert linear.attributes.get_int("transB", 0) == (form == "gemm")


@pytest.mark.parametrize("form", FORMS)
def test_the_product_is_rounded_once(graph, run, random, form) -> None:
    weights = stored(form, random)
    model = graph(FORMS[form], stored=weights)
    x = random(3, 64, dtype=np.float16) if form == "gemm" else random(2, 3, 64, dtype=np.float16)
    apply_reader(model, accumulate)
    np.testing.assert_allclose(run(model, {"x": x})[0].astype(np.float64), exact(form, x, weights), rtol=2**-11, atol=2e-4)


def test_float32_keeps_what_float16_sums_lose(graph, run) -> None:
    """2048 + 1 is 2048 in float16; 2048 and 64 ones are 2112 in float32 and after."""
    x = np.array([[[2048.0] + [1.0] * 63]], np.float16)
    model = graph(IN_OUT, stored={"weight": np.ones((64, 5), np.float16)})
    apply_reader(model, accumulate)
    np.testing.assert_array_equal(run(model, {"x": x})[0], np.full((1, 1, 5), 2112, np.float16))
    linear = next(node for node in model.graph if node.op_type == "MatMul")
    assert {value.dtype for value in (*linear.inputs, *linear.outputs)} == {ir.DataType.FLOAT}


def test_weight_that_is_also_the_embedding_keeps_its_other_reader(graph, run, random) -> None:
    table = random(5, 64, dtype=np.float16)
    text = """
    agraph (int64[B,S] ids, float16[5,64] weight) => (float16[B,S,5] y)
    { [embed] x = Gather(weight, ids) turned = Transpose<perm = [1, 0]>(weight) [linear] y = MatMul(x, turned) }
    """
    model = graph(text, stored={"weight": table})
    assert apply_reader(model, accumulate).fired == 1
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.inputs[0] is model.graph.initializers["weight"]
    y = run(model, {"ids": np.array([[0, 3]])})[0]
    np.testing.assert_allclose(y.astype(np.float64), (table[[0, 3]].astype(np.float64) @ table.T.astype(np.float64))[None], rtol=2**-11, atol=2e-4)


def test_result_that_is_read_twice_and_given_out_is_the_rounded_one(graph, random) -> None:
    text = IN_OUT.replace("(float16[B,S,5] y)", "(float16[B,S,5] y, float16[B,S,5] z, float16[B,S,5] w)").replace(
        "weight) }", "weight) z = Neg(y) w = Abs(y) }"
    )
    model = graph(text, stored={"weight": random(64, 5, dtype=np.float16)})
    apply_reader(model, accumulate)
    readers = [node for node in model.graph if node.op_type in {"Neg", "Abs"}]
    assert [node.inputs[0].name for node in readers] == ["y", "y"]
    assert [node.inputs[0].dtype for node in readers] == [ir.DataType.FLOAT16] * 2


@pytest.mark.parametrize(
    "text",
    [
        "agraph (float16[B,S,64] x, float16[B,64,T] keys) => (float16[B,S,T] y) { y = MatMul(x, keys) }",
        "agraph (float16[B,S,64] x, float16[B,T,64] keys) => (float16[B,S,T] y) { k = Transpose<perm = [0, 2, 1]>(keys) y = MatMul(x, k) }",
        "agraph (float16[B,S,64] x, float[B,64,T] keys) => (float16[B,S,T] y) { k = Cast<to = 10>(keys) y = MatMul(x, k) }",
        "agraph (float16[S,64] x, float16[64,T] keys, float16[5] weight) => (float16[S,T] y) { y = Gemm(x, keys, weight) }",
        "agraph (float16[B,S,64] x, float16[64,5] weight) => (float16[B,S,5] y) { w = Neg(weight) y = MatMul(x, w) }",
        IN_OUT.replace("float16", "float"),
        IN_OUT.replace("float16", "bfloat16"),
        "agraph (float16[B,S,64] x, float16[64] weight) => (float16[B,S,64] y) { y = Mul(x, weight) }",
    ],
    ids=["computed", "computed-turned", "computed-cast", "only-the-bias-is-stored", "weight-is-computed", "float32", "bfloat16", "no-product"],
)
def test_other_nodes_are_no_candidates(graph, text) -> None:
    model = graph(text)
    for value in [value for value in model.graph.inputs if value.name == "weight"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(np.zeros(value.shape.numpy(), value.dtype.numpy()), dtype=value.dtype, name="weight")
        model.graph.initializers.add(value)
    assert not any(accumulate.is_candidate(node) for node in model.graph)
    assert contract.SUMS_IN_FLOAT32.broken_at(model) is None


@pytest.mark.parametrize("foreign", ["MatMul", "Transpose"])
def test_operators_of_another_domain_are_no_candidates(graph, random, foreign) -> None:
    model = graph(TRANSPOSED, stored={"weight": random(5, 64, dtype=np.float16)})
    nodes = {node.op_type: node for node in model.graph}
    assert accumulate.is_candidate(nodes["MatMul"])
    nodes[foreign].domain = "com.example"
    assert not accumulate.is_candidate(nodes["MatMul"])


def test_either_operand_may_be_the_weight(graph, random) -> None:
    text = "agraph (float16[64,S] x, float16[5,64] weight) => (float16[5,S] y) { [linear] y = MatMul(weight, x) }"
    assert apply_reader(graph(text, stored={"weight": random(5, 64, dtype=np.float16)}), accumulate).fired == 1


def test_claim_holds_after_the_pass_and_a_second_one_does_nothing(graph, random) -> None:
    model = graph(TRANSPOSED, stored={"weight": random(5, 64, dtype=np.float16)})
    assert contract.SUMS_IN_FLOAT32.broken_at(model) == "linear"
    fusion = Fusion("accumulate", accumulate, None, ensures=(contract.SUMS_IN_FLOAT32,))
    (first,) = run_passes(model, (fusion,), shape=None)
    assert (first.fired, first.expected, first.passed) == (1, 1, True)
    assert contract.SUMS_IN_FLOAT32.broken_at(model) is None
    (second,) = run_passes(model, (fusion,), shape=None)
    assert (second.fired, second.expected) == (0, 0)
