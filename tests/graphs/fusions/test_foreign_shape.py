from __future__ import annotations

import numpy as np
import pytest

from graphs.fusions import foreign_shape
from graphs.fusions._reading import apply_reader

TEXT = """
agraph (float[B,S,8] x, int64[4] fed) => (float[B,S,2,4] y)
{ [reshape] y = Reshape(x, fed) }
"""


def test_makes_the_shape_constant(graph, run, random) -> None:
    model = graph(TEXT)
    given = {"x": random(3, 5, 8)}
    result = apply_reader(model, foreign_shape)
    assert (result.fired, result.refused) == (1, [])
    (node,) = model.graph
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), [0, 0, 2, 4])
    y = run(model, given | {"fed": np.array([3, 5, 2, 4])})[0]
    np.testing.assert_array_equal(y, given["x"].reshape(3, 5, 2, 4))


@pytest.mark.parametrize(("new", "node"), [("y = MatMul(x, fed)", "float[8,8] fed"), ("y = Neg(x)", "int64[4] fed")])
def test_other_operators_are_no_candidates(graph, new, node) -> None:
    text = TEXT.replace("y = Reshape(x, fed)", new).replace("int64[4] fed", node).replace("float[B,S,2,4] y", "float[B,S,8] y")
    assert [foreign_shape.is_candidate(node) for node in graph(text).graph] == [False]


@pytest.mark.parametrize("which", ["x", "y"])
def test_a_reshape_of_or_to_an_unknown_shape_is_no_candidate(graph, which) -> None:
    (node,) = graph(TEXT).graph
    (node.inputs[0] if which == "x" else node.outputs[0]).shape = None
    assert not foreign_shape.is_candidate(node)


def test_two_axes_become_heads_of_nothing(graph) -> None:
    """[B, S] → [B, S] is no projection to heads."""
    (node,) = graph(TEXT.replace("float[B,S,8] x", "int64[B,S] x").replace("float[B,S,2,4] y", "int64[B,S] y")).graph
    assert not foreign_shape.is_candidate(node)


@pytest.mark.parametrize("size", ["?", "U"])
def test_refuses_a_size_that_is_not_the_inputs_own(graph, size) -> None:
    model = graph(
        TEXT.replace("float[B,S,8] x", "float[B,S,T] x")
        .replace("[B,S,2,4]", f"[B,S,2,{size}]")
        .replace("[B,S,T]", f"[B,S,3,{size if size == '?' else 'T'}]")
    )
    result = apply_reader(model, foreign_shape)
    assert result.fired == 0
    assert [(refusal.node, refusal.reason) for refusal in result.refused] == [
        ("reshape", "size 3 of the shape is neither constant nor the size of axis 3 of the input")
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("float[B,S,2,4]", "float[S,B,2,4]"),
        ("float[B,S,8]", "float[B,8]"),
        ("int64[4] fed) => (float[B,S,2,4] y)", "int64[4] more) => (float[B,S,2,4] y)"),
    ],
)
def test_other_reshapes_are_no_candidates(graph, before, after) -> None:
    constants = {"fed": np.array([0, 0, 2, 4])} if "more" in after else None
    text = TEXT.replace(before, after)
    model = graph(text.replace("int64[4] more", "int64[4] fed"), constants=constants)
    assert [foreign_shape.is_candidate(node) for node in model.graph] == [False]
