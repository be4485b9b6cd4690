"""graphs/joined.py: the cuts, joined, are the graph; what was lost, changed or moved on the way is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.joined import Cuts, body_key, cut_graph, joined_difference

TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (int64[1,N] ids, float[1,M,4] past0, float[1,M,4] past1) => (float[1,N,4] logits, float[1,T,4] present0, float[1,T,4] present1)
<float[2,4] table = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}, int64[1] axis = {2}, float[1] scale0 = {2.0}, float[1] scale1 = {3.0}>
{
    embedded = Gather(table, ids)
    shared = Cast<to=1>(ids)
    mask = Unsqueeze(shared, axis)
    a0 = Mul(embedded, mask)
    present0 = Concat<axis=1>(past0, a0)
    h0 = Mul(a0, scale0)
    a1 = Mul(h0, mask)
    present1 = Concat<axis=1>(past1, a1)
    h1 = Mul(a1, scale1)
    logits = Sigmoid(h1)
}"""
MODULES = {"embedded": "model.embed_tokens", "logits": "lm_head"}
MODULES |= {name: f"model.layers.{layer}" for layer in (0, 1) for name in (f"a{layer}", f"present{layer}", f"h{layer}")}


def graph(text: str = TEXT) -> ir.Model:
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
        node.metadata_props[MODULE_KEY] = MODULES.get(node.name, "")
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_joined_cuts_are_the_graph() -> None:
    cuts = cut_graph(graph())
    difference, moved = joined_difference(cuts)
    assert difference.same
    assert moved == []
    assert len(cuts.all) == 4


def change_operator(cuts: Cuts) -> None:
    node(cuts.layers[1], "a1").op_type = "Add"


def change_attribute(cuts: Cuts) -> None:
    node(cuts.shared, "shared").attributes["to"] = ir.AttrInt64("to", 11)


def change_constant(cuts: Cuts) -> None:
    cuts.layers[0].graph.initializers["scale0"].const_value = ir.tensor(np.array([2.5], np.float32), name="scale0")


def change_edge(cuts: Cuts) -> None:
    node(cuts.layers[1], "h1").replace_input_with(0, cuts.layers[1].graph.inputs[0])


def lose_an_input(cuts: Cuts) -> None:
    cuts.layers[1].graph.inputs[0].name = "h7"


@pytest.mark.parametrize(
    ("damage", "outputs", "first"),
    [
        (change_operator, ["logits", "present1"], "a1 (Add, model.layers.1)"),
        (change_attribute, ["logits", "present0", "present1"], "shared (Cast)"),
        (change_constant, ["logits", "present1"], "h0 (Mul, model.layers.0)"),
        (change_edge, ["logits"], "h1 (Mul, model.layers.1)"),
        (lose_an_input, ["logits", "present1"], "a1 (Mul, model.layers.1)"),
    ],
)
def test_what_differs_is_named(damage: Callable[[Cuts], None], outputs: list[str], first: str) -> None:
    cuts = cut_graph(graph())
    damage(cuts)
    difference, _ = joined_difference(cuts)
    assert difference.outputs == outputs
    assert difference.only_right[0] == first


def external(offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor("weights.bin", offset, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="scale1", base_dir="")


def with_external_scale() -> ir.Model:
    model = graph()
    model.graph.initializers["scale1"].const_value = external(0)
    return model


def test_a_weight_that_a_cut_reads_from_another_place_is_named() -> None:
    cuts = cut_graph(with_external_scale())
    assert joined_difference(cuts)[1] == []
    cuts.layers[1].graph.initializers["scale1"].const_value = external(64)
    assert joined_difference(cuts)[1] == ["scale1"]


def test_body_key_is_that_of_graphs_that_differ_in_their_tails_alone() -> None:
    other_tail = graph(TEXT.replace("logits = Sigmoid(h1)", "logits = Tanh(h1)"))
    assert body_key(cut_graph(graph())) == body_key(cut_graph(other_tail))
    assert body_key(cut_graph(graph())) != body_key(cut_graph(graph(TEXT.replace("h0 = Mul(a0", "h0 = Add(a0"))))
    moved = with_external_scale()
    moved.graph.initializers["scale1"].const_value = external(64)
    assert body_key(cut_graph(with_external_scale())) != body_key(cut_graph(moved))
