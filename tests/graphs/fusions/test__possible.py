from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions._possible import possible

LEAST = float(np.finfo(np.float32).min)
LEAST16 = float(np.finfo(np.float16).min)
INF = np.inf
HEAD = (
    "agraph (bool[2,3] flag, float[2,3] fed, int64[2,3] ids, int64[2] sizes, int64[2,3,2] places) => (y)\n"
    f"<float zero = {{0}}, float[1] one = {{1}}, float two = {{2}}, float least = {{{LEAST}}}, int64[2] shape = {{2, 3}}, int64[1] axis = {{0}},\n"
    " float[9] nine = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[8] eight = {1, 2, 3, 4, 5, 6, 7, 8}, int64 three = {3}>\n"
    "{ mask = Where(flag, zero, least)\n number = Cast<to=1>(flag)\n y = EXPRESSION }"
)


@pytest.mark.parametrize(
    ("expression", "numbers"),
    [
        ("Where(flag, zero, least)", {0, LEAST}),
        ("Where(flag, least, two)", {2, LEAST}),
        ("Where(flag, fed, zero)", None),
        ("Where(flag, zero, fed)", None),
        ("Expand(mask, shape)", {0, LEAST}),
        ("Reshape(mask, shape)", {0, LEAST}),
        ("Unsqueeze(mask, axis)", {0, LEAST}),
        ("Transpose(mask)", {0, LEAST}),
        ("Slice(mask, axis, shape)", {0, LEAST}),
        ("Squeeze(one, axis)", {1}),
        ("Trilu(one2)", {0, 1}),
        ("Concat<axis=0>(mask, one2)", {0, 1, LEAST}),
        ("Concat<axis=0>(mask, fed)", None),
        ("ConstantOfShape(sizes)", {0}),
        ("ConstantOfShape<value = float[1] {5.0}>(sizes)", {5}),
        ("ScatterND(mask, places, two_2)", {0, 2, LEAST}),
        ("ScatterND(mask, places, fed)", None),
        ("ScatterND(fed, places, two_2)", None),
        ("Cast<to=1>(flag)", {0, 1}),
        ("Cast<to=10>(mask)", {0, -INF}),
        ("Cast<to=9>(fed)", {0, 1}),
        ("And(flag, flag)", {0, 1}),
        ("Add(mask, mask)", {0, LEAST, -INF}),
        ("Sub(one, number)", {0, 1}),
        ("Mul(mask, number)", {0, LEAST}),
        ("Mul(overflown, number)", {0, LEAST, -INF, np.nan}),
        ("Max(overflown, least)", {0, LEAST}),
        ("Min(mask, two)", {0, LEAST}),
        ("Mul(fed, zero)", None),
        ("Exp(mask)", None),
        ("Div(mask, two)", None),
        ("Identity(ids)", None),
        ("Add(eight, zero)", {1, 2, 3, 4, 5, 6, 7, 8}),
        ("Add(nine, zero)", None),
        ("Where(as_flag, least, inverted)", {0, LEAST}),
        ("Where(as_flag, inverted, least)", None),
        ("Where(flag, least, inverted)", None),
        ("Where(as_flag, least, fed)", None),
        ("Where(not_flag, least, as_number)", {0, 1, LEAST}),
    ],
)
def test_knows_what_numbers_a_value_holds(graph, expression, numbers) -> None:
    before = {
        "one2": "one2 = Expand(one, shape)\n ",
        "two_2": "two_2 = Expand(two, shape)\n ",
        "overflown": "overflown = Add(mask, mask)\n ",
        "inverted": "inverted = Sub(one, fed)\n ",
        "not_flag": "not_flag = Not(flag)\n as_number = Cast<to=1>(not_flag)\n ",
        "as_flag": "as_flag = Cast<to=9>(inverted)\n ",
    }
    made = "".join(line for name, line in before.items() if name in expression or (name == "inverted" and "as_flag" in expression))
    model = common_passes.ShapeInferencePass()(graph(HEAD.replace("y = EXPRESSION", f"{made}y = {expression}"))).model
    found = possible(model.graph.outputs[0])
    assert (None if found is None else sorted(found, key=str)) == (
        None if numbers is None else pytest.approx(sorted(map(float, numbers), key=str), nan_ok=True)
    )


def test_a_value_of_no_known_dtype_is_taken_as_it_is(graph) -> None:
    model = graph("agraph (float[2] fed) => (y)\n<float big = {1e30}>\n{ more = Mul(big, big)\n y = Mul(more, more) }")
    assert possible(model.graph.outputs[0]) == {float(np.float32(1e30)) ** 4}


def test_a_fed_boolean_is_0_or_1(graph) -> None:
    assert possible(graph("agraph (bool[2] x) => (y) { y = Not(x) }").graph.inputs[0]) == {0, 1}


def test_half_precision_rounds_to_nothing(graph) -> None:
    constants = {name: np.array(number, np.float16) for name, number in (("zero", 0), ("least", LEAST16))}
    text = "agraph (bool[2] flag, float16 zero, float16 least) => (y) { mask = Where(flag, zero, least)\n y = Add(mask, least) }"
    model = common_passes.ShapeInferencePass()(graph(text, constants=constants)).model
    assert possible(model.graph.outputs[0]) == {LEAST16, -INF}


def test_each_value_is_looked_at_once(graph) -> None:
    """Forty doublings are 2^40 ways through the graph."""
    lines = "\n".join(f"x{step + 1} = Max(x{step}, x{step})" for step in range(40))
    model = graph(f"agraph (bool[2] flag) => (x40)\n<float zero = {{0}}>\n{{ x0 = Where(flag, zero, zero)\n{lines} }}")
    assert possible(model.graph.outputs[0]) == {0}
    assert isinstance(model.graph.outputs[0], ir.Value)
