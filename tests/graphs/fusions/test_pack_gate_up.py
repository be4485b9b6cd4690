from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import pack_gate_up
from graphs.rewriting import apply_fusion

LAYER = "model.layers.3.mlp"
GATE, UP = f"{LAYER}.gate_proj.weight", f"{LAYER}.up_proj.weight"
TEXT = """
agraph (float[B,S,4] x, float[6,4] w_gate, float[6,4] w_up) => (float[B,S,6] y)
{
    gate_turned = Transpose<perm=[1,0]>(w_gate)
    gate = MatMul(x, gate_turned)
    [sigmoid] sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    up_turned = Transpose<perm=[1,0]>(w_up)
    up = MatMul(x, up_turned)
    y = Mul(silu, up)
}
"""
FORM = ["Transpose", "MatMul", "Reshape", "Split", "Squeeze", "Squeeze", "Sigmoid", "Mul", "Mul"]


@pytest.fixture
def swiglu(graph, random):
    """The graph with its weights side by side in one file, by Hugging Face's names."""

    def make(text=TEXT, dtype=np.float32, names=("w_gate", "w_up"), renamed=(GATE, UP), gap=0, sizes=(6, 6)):
        weights = {name: random(size, 4, dtype=dtype) for name, size in zip(names, sizes, strict=True)}
        model = graph(text if dtype == np.float32 else text.replace("float[", "float16["), stored=weights, gap=gap)
        for short, name in zip(("w_gate", "w_up"), renamed, strict=True):
            model.graph.initializers[short].name = name
        for node in model.graph:
            node.metadata_props[MODULE_KEY] = LAYER
        return model

    return make


def fuse(model):
    return apply_fusion(model, pack_gate_up.RULES, pack_gate_up.is_candidate)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packs_into_one_linear_and_keeps_the_numbers(swiglu, run, random, dtype) -> None:
    model = swiglu(dtype=dtype)
    feeds = {"x": random(2, 5, 4, dtype=dtype)}
    before_y = run(model, feeds)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph] == FORM
    assert [dict(node.attributes) for node in model.graph if node.op_type not in ("Transpose", "Split")] == [{}] * 7
    assert tuple(model.graph.node(0).attributes.get_ints("perm")) == (1, 0)
    assert (model.graph.node(3).attributes.get_int("axis"), set(model.graph.node(3).attributes)) == (2, {"axis"})
    constants = [model.graph.node(i).inputs[1].const_value.numpy().tolist() for i in (2, 3, 4, 5)]
    assert constants == [[0, 0, 2, 6], [1, 1], [2], [2]]
    # ONNX Runtime computes a float16 graph in float32 and rounds at the casts it inserts: other nodes, other places
    np.testing.assert_allclose(run(model, feeds)[0], before_y, rtol=0 if dtype == np.float32 else 2**-10)


def test_packed_weight_is_a_view_of_the_same_bytes(swiglu) -> None:
    model = swiglu()
    gate, up = (model.graph.initializers[name].const_value for name in (GATE, UP))
    fuse(model)
    packed = model.graph.initializers[f"{LAYER}.gate_up_proj.weight"].const_value
    assert isinstance(packed, ir.ExternalTensor)
    assert (packed.location, packed.offset, packed.length) == (gate.location, gate.offset, gate.nbytes + up.nbytes)
    np.testing.assert_array_equal(packed.numpy(), np.concatenate((gate.numpy(), up.numpy())))
    assert {GATE, UP}.isdisjoint(model.graph.initializers)


def test_new_values_have_module_dtype_and_shape(swiglu) -> None:
    model = swiglu()
    fuse(model)
    assert [node.metadata_props[MODULE_KEY] for node in model.graph] == [f"{LAYER}.gate_up_proj"] * 2 + [LAYER] * 7
    assert all(value.dtype == ir.DataType.FLOAT for node in model.graph for value in node.outputs)
    shapes = [str(value.shape) for node in model.graph for value in node.outputs]
    assert shapes == ["[4,12]", "[B,S,12]", "[B,S,2,6]", "[B,S,1,6]", "[B,S,1,6]", *["[B,S,6]"] * 5]


@pytest.mark.parametrize(
    ("before", "after"),
    [("Mul(silu, up)", "Mul(up, silu)"), ("Mul(gate, sigmoid)", "Mul(sigmoid, gate)")],
)
def test_fuses_every_order_of_operands(swiglu, before, after) -> None:
    model = swiglu(TEXT.replace(before, after))
    assert fuse(model).fired == 1
    assert [node.op_type for node in model.graph] == FORM


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gap": 2}, f"{UP} does not lie behind {GATE}: weights.bin bytes 16 to 112, weights.bin bytes 114 to 210; a packed weight would be a copy"),
        ({"names": ("w_up", "w_gate")}, f"{UP} does not lie behind {GATE}"),
        ({"renamed": (UP, GATE)}, "are not named mlp.gate_proj, mlp.up_proj of one layer"),
        ({"renamed": (GATE, UP.replace("3", "4"))}, "are not named mlp.gate_proj, mlp.up_proj of one layer"),
        ({"renamed": ("w1", "w3")}, "w1, w3 are not named mlp.gate_proj, mlp.up_proj of one layer"),
        ({"text": TEXT.replace("[B,S,4] x", "[S,4] x")}, "the input is not [B, S, E]"),
        ({"text": TEXT.replace("float[6,4] w_up", "float[1,4] w_up"), "sizes": (6, 1)}, "gate and up are not of one shape"),
        ({"text": TEXT.replace("Mul(silu, up)", "Add(silu, up)")}, "expected"),
        (
            {"text": TEXT.replace("MatMul(x, up_turned)", "MatMul(y0, up_turned)").replace("{\n", "{\n    y0 = Neg(x)\n", 1)},
            "two operands should be one value",
        ),
    ],
)
def test_refuses_with_a_reason(swiglu, options, reason) -> None:
    model = swiglu(**options)
    result = fuse(model)
    assert result.fired == 0
    assert "Split" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == "sigmoid"
    assert reason in refusal.reason


def test_refuses_weights_that_are_not_stored_outside(graph, random) -> None:
    model = graph(TEXT, constants={"w_gate": random(6, 4), "w_up": random(6, 4)})
    result = fuse(model)
    assert result.fired == 0
    assert "w_gate is not a weight [out, in] stored outside the graph" in result.refused[0].reason


def test_refuses_weights_of_two_dtypes(swiglu) -> None:
    """No valid graph of one MatMul dtype has them; the bytes alone would pass."""
    model = swiglu()
    model.graph.initializers[UP].dtype = ir.DataType.FLOAT16
    result = fuse(model)
    assert result.fired == 0
    assert f"{GATE}, {UP} are not of one dtype" in result.refused[0].reason


def test_refuses_a_weight_in_another_file(swiglu) -> None:
    model = swiglu()
    up = model.graph.initializers[UP]
    up.const_value = ir.ExternalTensor("other.bin", up.const_value.offset, up.const_value.length, up.dtype, shape=up.shape, name=UP)
    result = fuse(model)
    assert result.fired == 0
    assert "weights.bin bytes 16 to 112, other.bin bytes 112 to 208" in result.refused[0].reason


GATE_BIAS, UP_BIAS = f"{LAYER}.gate_proj.bias", f"{LAYER}.up_proj.bias"
BIASED = (
    TEXT.replace("float[6,4] w_up)", "float[6,4] w_up, float[6] b_gate, float[6] b_up)")
    .replace("    gate = MatMul(x, gate_turned)", "    g = MatMul(x, gate_turned)\n    gate = Add(g, b_gate)")
    .replace("    up = MatMul(x, up_turned)", "    u = MatMul(x, up_turned)\n    up = Add(u, b_up)")
)


@pytest.fixture
def biased_swiglu(graph, random):
    """The same graph with biases behind the weights in the file, in the order of ``names``."""

    def make(text=BIASED, dtype=np.float32, names=("b_gate", "b_up"), renamed=(GATE_BIAS, UP_BIAS)):
        stored = {name: random(6, 4, dtype=dtype) for name in ("w_gate", "w_up")} | {name: random(6, dtype=dtype) for name in names}
        model = graph(text if dtype == np.float32 else text.replace("float[", "float16["), stored=stored)
        for short, name in zip(("w_gate", "w_up", "b_gate", "b_up"), (GATE, UP, *renamed), strict=True):
            model.graph.initializers[short].name = name
        for node in model.graph:
            node.metadata_props[MODULE_KEY] = LAYER
        return model

    return make


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("text", [BIASED, BIASED.replace("Add(g, b_gate)", "Add(b_gate, g)")], ids=["bias-second", "bias-first"])
def test_packs_biases_into_one_and_keeps_the_numbers(biased_swiglu, run, random, text, dtype) -> None:
    model = biased_swiglu(text, dtype=dtype)
    feeds = {"x": random(2, 5, 4, dtype=dtype)}
    before_y = run(model, feeds)[0]
    parts = [model.graph.initializers[name].const_value for name in (GATE_BIAS, UP_BIAS)]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph] == [*FORM[:2], "Add", *FORM[2:]]
    assert model.graph.node(2).metadata_props[MODULE_KEY] == f"{LAYER}.gate_up_proj"
    packed = model.graph.initializers[f"{LAYER}.gate_up_proj.bias"].const_value
    assert (packed.location, packed.offset, packed.length) == (parts[0].location, parts[0].offset, 2 * parts[0].nbytes)
    np.testing.assert_array_equal(packed.numpy(), np.concatenate([part.numpy() for part in parts]))
    np.testing.assert_allclose(run(model, feeds)[0], before_y, rtol=0 if dtype == np.float32 else 2**-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"names": ("b_up", "b_gate")}, f"{UP_BIAS} does not lie behind {GATE_BIAS}"),
        ({"renamed": (GATE_BIAS.replace("3", "4"), UP_BIAS.replace("3", "4"))}, "are not the biases of"),
        ({"text": BIASED.replace("float[6] b_up", "float[1] b_up")}, f"{UP_BIAS} is not a bias [out] stored outside the graph"),
    ],
    ids=["order", "layer", "shape"],
)
def test_refuses_biases_with_a_reason(biased_swiglu, options, reason) -> None:
    model = biased_swiglu(**options)
    result = fuse(model)
    assert result.fired == 0
    (refusal,) = result.refused
    assert (refusal.node, reason in refusal.reason) == ("sigmoid", True)


def test_refuses_a_bias_on_one_of_two(biased_swiglu) -> None:
    text = BIASED.replace("    u = MatMul(x, up_turned)\n    up = Add(u, b_up)", "    up = MatMul(x, up_turned)")
    result = fuse(biased_swiglu(text.replace("=> (float[B,S,6] y)", "=> (float[B,S,6] y, float[6] z)").replace("}", "    z = Neg(b_up)\n}")))
    assert result.fired == 0
    assert len(result.refused) == 1


@pytest.mark.parametrize("which", ["gate", "up"])
@pytest.mark.parametrize("text", [TEXT, BIASED], ids=["plain", "biased"])
def test_refuses_a_weight_that_is_not_turned(swiglu, biased_swiglu, text, which) -> None:
    """Transpose<perm=[0,1]> changes nothing: the weight is [in, out]."""
    make = swiglu if text is TEXT else biased_swiglu
    assert fuse(make(text.replace(f"Transpose<perm=[1,0]>(w_{which})", f"Transpose<perm=[0,1]>(w_{which})"))).fired == 0
