"""graphs/diff.py: same computation or not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.diff import compare_graphs

BASE = """<ir_version: 10, opset_import: ["" : 23]>
g (float[B,4] x) => (float[B,4] y)
<float[1] one = {1.0}, float[1] two = {2.0}>
{
    a = Mul(x, two)
    b = Add(a, one)
    y = Softmax<axis=-1>(b)
}"""


def graph(text: str) -> ir.Model:
    return ir.from_onnx_text(text)


def test_renamed_and_reordered_graph_is_the_same() -> None:
    other = (
        BASE.replace("a =", "q =")
        .replace("Add(a", "Add(q")
        .replace("float[1] one = {1.0}, float[1] two = {2.0}", "float[1] two = {2.0}, float[1] one = {1.0}")
    )
    assert compare_graphs(graph(BASE), graph(other)).same


def test_repeated_node_is_the_same_as_a_shared_one() -> None:
    repeated = BASE.replace("b = Add(a, one)", "c = Mul(x, two)\n    b = Add(a, one)").replace("Softmax<axis=-1>(b)", "Softmax<axis=-1>(b)")
    assert compare_graphs(graph(BASE), graph(repeated)).same


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("{2.0}", "{2.5}", "Mul"),
        ("Add(a, one)", "Sub(a, one)", "Add"),
        ("axis=-1", "axis=0", "Softmax"),
        ("Add(a, one)", "Add(x, one)", "Add"),
        ("Add(a, one)", "Add(one, a)", "Add"),
    ],
    ids=["constant", "operator", "attribute", "edge", "operand-order"],
)
def test_one_change_is_found_where_it_is(old: str, new: str, first: str) -> None:
    difference = compare_graphs(graph(BASE), graph(BASE.replace(old, new)))
    assert not difference.same
    assert difference.outputs == ["y"]
    assert first in difference.only_left[0]


def test_renamed_graph_input_is_a_difference() -> None:
    assert not compare_graphs(graph(BASE), graph(BASE.replace("float[B,4] x", "float[B,4] z").replace("Mul(x", "Mul(z"))).same


def test_a_large_constant_in_the_graph_counts_by_its_content() -> None:
    """Larger than what is worth a file: a name alone would hide another table."""
    text = BASE.replace("float[B,4] x", "float[2048,4] x")
    graphs = [graph(text) for _ in range(3)]
    for model, last in zip(graphs, (2.0, 2.0, 3.0), strict=True):
        values = np.full((2048, 1), 2.0, np.float32)
        values[-1] = last
        two = model.graph.initializers["two"]
        two.const_value, two.shape = ir.tensor(values, name="two"), ir.Shape(values.shape)
    same, other = (compare_graphs(graphs[0], model) for model in graphs[1:])
    assert same.same
    assert other.outputs == ["y"]
    assert "Mul" in other.only_left[0]
