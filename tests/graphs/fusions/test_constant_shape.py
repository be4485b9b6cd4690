from __future__ import annotations

import numpy as np
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import constant_shape
from graphs.rewriting import apply_fusion

TEXT = """
agraph (float[B,S,6] x, int64[B,S] input_ids) => (float[B,S,3,2] y)
<int64[1] heads = {3}, int64[1] head_dim = {2}>
{
    batch = Shape<start=0, end=1>(input_ids)
    new = Shape<start=1, end=2>(input_ids)
    shape = Concat<axis=0>(batch, new, heads, head_dim)
    [reshape] y = Reshape<allowzero=1>(x, shape)
}
"""


def fuse(model):
    return apply_fusion(model, constant_shape.RULES, constant_shape.is_candidate)


@pytest.mark.parametrize("new", [0, 1, 4])
def test_makes_the_shape_constant_and_keeps_the_numbers(graph, run, random, new) -> None:
    model = graph(TEXT)
    feeds = {"x": random(2, new, 6), "input_ids": np.zeros((2, new), np.int64)}
    before_y = run(model, feeds)[0]
    model.graph.node(-1).metadata_props[MODULE_KEY] = "model.layers.3.self_attn"
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    (node,) = model.graph
    assert (node.op_type, dict(node.attributes), node.metadata_props[MODULE_KEY]) == ("Reshape", {}, "model.layers.3.self_attn")
    assert node.inputs[1].const_value.numpy().tolist() == [0, 0, 3, 2]
    np.testing.assert_array_equal(run(model, feeds)[0], before_y)


def test_is_done_once(graph) -> None:
    model = graph(TEXT)
    fuse(model)
    again = fuse(model)
    assert (again.fired, again.refused) == (0, [])


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"Concat<axis=0>(batch, new, heads, head_dim)": "Concat<axis=0>(new, batch, heads, head_dim)"}, "size 0 of the shape is neither constant"),
        ({"int64[B,S] input_ids": "int64[B,T] input_ids"}, "size 1 of the shape is neither constant nor the size of axis 1 of the input"),
        ({"int64[B,S] input_ids": "int64[B,?] input_ids", "[B,S,6] x": "[B,?,6] x"}, "size 1 of the shape is neither constant"),
        ({"(input_ids)": "(ids)", "{\n    batch": "{\n    ids = Identity(input_ids)\n    batch"}, "size 0 of the shape is neither constant"),
        ({"start=1, end=2": "start=0, end=2"}, "size 1 of the shape is neither constant"),
        ({"new = Shape<start=1, end=2>(input_ids)": "new = Neg(heads)"}, "size 1 of the shape is neither constant"),
        ({"heads = {3}": "heads = {0}"}, "a constant part of the shape is 0, or not a single size"),
        ({"int64[1] head_dim = {2}": "int64[2] head_dim = {2, 1}"}, "a constant part of the shape is 0, or not a single size"),
    ],
)
def test_refuses_with_a_reason(graph, edits, reason) -> None:
    text = TEXT
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    result = fuse(graph(text))
    assert result.fired == 0
    (refusal,) = result.refused
    assert refusal.node == "reshape"
    assert reason in refusal.reason


def test_refuses_a_shape_that_is_fed(graph) -> None:
    """Such a Reshape is no candidate: nothing of its shape is computed."""
    model = graph("agraph (float[B,S,6] x, int64[4] shape) => (float[B,S,3,2] y) { y = Reshape(x, shape) }")
    assert (fuse(model).fired, fuse(model).refused) == (0, [])
    rule = constant_shape.RULES.rules[0]
    match = rule.match(model, model.graph, model.graph.node(0))
    assert not match
    assert match is None


def test_says_that_a_shape_is_not_joined(graph) -> None:
    model = graph("agraph (float[B,S,6] x, int64[4] shape) => (float[B,S,3,2] y) { y = Reshape(x, shape) }")
    (x, shape), rule = model.graph.inputs, constant_shape.FuseConstantShape()
    assert next(rule.objections(x=x, shape=shape)) == ("the shape is not joined from single sizes", shape)


def test_reads_a_size_from_the_first_axis_on(graph) -> None:
    assert fuse(graph(TEXT.replace("Shape<start=0, end=1>", "Shape<end=1>"))).fired == 1


def test_refuses_an_input_of_unknown_shape(graph) -> None:
    model = graph(TEXT)
    model.graph.inputs[0].shape = None
    assert "size 0 of the shape is neither constant nor the size of axis 0 of the input" in fuse(model).refused[0].reason
