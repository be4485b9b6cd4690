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


def test_refuses_a_size_that_is_not_the_inputs_own(graph) -> None:
    model = graph(TEXT.replace("float[B,S,8] x", "float[B,S,T] x").replace("[B,S,2,4]", "[B,S,2,U]"))
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
