"""Gate and up become one linear that is sliced on its last axis; what is matched and refused is PackGateUp's (test_pack_gate_up.py)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import pack_gate_up, pack_sliced_gate_up
from graphs.rewriting import apply_fusion

LAYER = "model.layers.3.mlp"
PARTS = ("gate", "up")
TEXT = """
agraph (float[B,S,4] x, float[6,4] w_gate, float[6,4] w_up, float[6] b_gate, float[6] b_up) => (float[B,S,6] y)
{
    gate_turned = Transpose<perm=[1,0]>(w_gate)
    gate0 = MatMul(x, gate_turned)
    gate = ADD(gate0, b_gate)
    [sigmoid] sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    up_turned = Transpose<perm=[1,0]>(w_up)
    up0 = MatMul(x, up_turned)
    up = ADD(up0, b_up)
    y = Mul(silu, up)
}
"""


@pytest.fixture
def swiglu(graph, random):
    """The graph with weights and biases side by side in one file."""

    def make(biased=False, order=PARTS):
        text = TEXT.replace("ADD", "Add")
        if not biased:
            text = text.replace(", float[6] b_gate, float[6] b_up", "")
            for part in PARTS:
                text = text.replace(f"    {part} = Add({part}0, b_{part})\n", "").replace(f"{part}0 = ", f"{part} = ")
        stored = {f"w_{part}": random(6, 4) for part in order} | ({f"b_{part}": random(6) for part in order} if biased else {})
        model = graph(text, stored=stored)
        for part in PARTS:
            for short, kind in ((f"w_{part}", "weight"), (f"b_{part}", "bias")):
                if short in model.graph.initializers:
                    model.graph.initializers[short].name = f"{LAYER}.{part}_proj.{kind}"
        for node in model.graph:
            node.metadata_props[MODULE_KEY] = LAYER
        return model

    return make


def fuse(model):
    return apply_fusion(model, pack_sliced_gate_up.RULES, pack_sliced_gate_up.is_candidate)


@pytest.mark.parametrize("biased", [False, True])
def test_packs_into_one_linear_and_keeps_the_numbers(swiglu, run, random, biased) -> None:
    model, feeds = swiglu(biased), {"x": random(2, 5, 4)}
    before = run(model, feeds)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    linear = ["Transpose", "MatMul", *(["Add"] if biased else [])]
    assert [node.op_type for node in model.graph] == [*linear, "Split", "Sigmoid", "Mul", "Mul"]
    split = model.graph.node(len(linear))
    assert {name: attribute.value for name, attribute in split.attributes.items()} == {"axis": 2}
    assert split.inputs[1].const_value.numpy().tolist() == [6, 6]
    assert split.inputs[1].name == "y.halves"
    assert [(value.dtype, value.shape) for value in split.outputs] == [(ir.DataType.FLOAT, ["B", "S", 6])] * 2
    assert [node.metadata_props[MODULE_KEY] for node in model.graph] == [f"{LAYER}.gate_up_proj"] * len(linear) + [LAYER] * 4
    np.testing.assert_array_equal(run(model, feeds)[0], before)


def test_fuses_every_order_of_operands(swiglu) -> None:
    model = swiglu()
    last = model.graph.node(-1)
    silu, up = last.inputs
    last.replace_input_with(0, up)
    last.replace_input_with(1, silu)
    assert fuse(model).fired == 1


def test_packed_weight_is_a_view_of_the_same_bytes(swiglu) -> None:
    model = swiglu()
    gate, up = (model.graph.initializers[f"{LAYER}.{part}_proj.weight"].const_value for part in PARTS)
    fuse(model)
    packed = model.graph.initializers[f"{LAYER}.gate_up_proj.weight"].const_value
    assert isinstance(packed, ir.ExternalTensor)
    assert (packed.location, packed.offset, packed.length) == (gate.location, gate.offset, gate.nbytes + up.nbytes)


def test_refuses_and_finds_candidates_as_the_other_form_does(swiglu) -> None:
    model = swiglu(order=("up", "gate"))
    result = fuse(model)
    assert result.fired == 0
    assert f"{LAYER}.up_proj.weight does not lie behind {LAYER}.gate_proj.weight" in result.refused[0].reason
    assert pack_sliced_gate_up.is_candidate is pack_gate_up.is_candidate
