from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from artifact.io_spec import TOTAL
from graphs.fusions._foreign_mask import Condition, check_conditions, check_new_are_last, condition_of_bias, is_nothing
from graphs.fusions._reading import Refused

HEAD = (
    "agraph (bool[B,1,S,T] allowed, float[B,2,P,8] past, float[B,2,S,8] new, float[B,2,T,4] part, int64[B,2,S,8] slots, int64[N,4] places,\n"
    " float[8,8] square, float[8,8] rows) => (y)\n<float zero = {0}, float least = {-3.4028234663852886e+38}, int64[4] four = {1, 1, 1, 1}>\n{ "
)


@pytest.fixture
def output(graph):
    """The last value of a graph, with shapes."""
    return lambda text: common_passes.ShapeInferencePass()(graph(f"{HEAD}{text} }}")).model.graph.outputs[0]


@pytest.mark.parametrize(("number", "nothing"), [(-65504.0, True), (-np.inf, True), (-65503.0, False), (0, False), (None, False)])
def test_knows_which_scores_are_nothing(number, nothing) -> None:
    assert is_nothing(number) == nothing


@pytest.mark.parametrize("behind", ["y = Expand(mask, four)", "y = Cast<to=10>(mask)", "wide = Expand(mask, four)\n y = Cast<to=10>(wide)"])
def test_finds_the_condition_of_a_choice(output, behind) -> None:
    condition = condition_of_bias(output(f"mask = Where(allowed, zero, least)\n {behind}"))
    assert (condition.value.name, condition.allows) == ("allowed", True)


def test_one_condition_of_several_has_all_rows_and_columns(graph) -> None:
    model = graph("agraph (bool[B,1,S,T] whole, bool[B,1,1,T] padding, bool[B,1,T] flat, bool[B,1,S,T,1] deep) => (y) { y = Not(whole) }")
    whole, padding, flat, deep = ([Condition(value)] for value in model.graph.inputs)
    check_conditions(whole + padding, "S", "T")
    check_conditions(padding + whole, "S", "T")
    with pytest.raises(Refused, match="no mask has a row for each query and a column for each key"):
        check_conditions(padding, "S", "T")
    for other in (flat, deep):
        with pytest.raises(Refused, match=r"the mask is \['B', 1, .*\], not \[B, 1, S, T\]"):
            check_conditions(whole + other, "S", "T")


@pytest.mark.parametrize(
    "text",
    [
        "past4 = Neg(past)\n y = Concat<axis=2>(past4, new)",
        "past4 = Neg(past)\n y = Concat<axis=-2>(past4, new)",
        "y = Neg(new)",
        "y = Concat<axis=-1>(part, part)",
        "written = ScatterElements<axis=2>(new, slots, new)\n y = MatMul(written, square)",
        "written = ScatterElements<axis=0>(rows, slots, new)\n y = Gemm(square, written)",
        "written = ScatterElements<axis=2>(new, slots, new)\n y = Attention(written, new, new)",
    ],
)
def test_new_rows_are_the_last(output, text) -> None:
    """They lie behind the past, or are all there is; what is written behind a linear is no cache."""
    value = output(text)
    value.shape = ir.Shape(["B", 2, "S" if text == "y = Neg(new)" else TOTAL, 8])
    check_new_are_last("keys", value, "S")


@pytest.mark.parametrize(
    "written",
    [
        "ScatterElements<axis=2>(new, slots, new)",
        "Scatter<axis=2>(new, slots, new)",
        "ScatterND(new, places, new)",
        "TensorScatter(new, new)",
    ],
)
def test_refuses_what_is_written_into_a_cache(output, written) -> None:
    with pytest.raises(Refused, match=rf"keys come from {written.split('<')[0].split('(')[0]}: a cache of fixed capacity"):
        check_new_are_last("keys", output(f"written = {written}\n y = Neg(written)"), "S")


@pytest.mark.parametrize("text", ["y = Concat<axis=2>(new, past)", "y = Concat<axis=2>(past, unknown)"])
def test_refuses_a_past_behind_the_new(graph, text) -> None:
    model = common_passes.ShapeInferencePass()(graph(f"{HEAD.replace('float[8,8] rows', 'float[8,8] rows, float unknown')}{text} }}")).model
    value = model.graph.outputs[0]
    value.producer().inputs[-1].shape = None if "unknown" in text else value.producer().inputs[-1].shape
    value.shape = model.graph.inputs[1].shape
    with pytest.raises(Refused, match=r"keys end with \[.*\]; expected the S new rows, behind those of the past"):
        check_new_are_last("keys", value, "S")


def test_each_node_on_the_way_is_looked_at_once(graph) -> None:
    """Thirty doublings are 2^30 ways back."""
    lines = "\n".join(f"x{step + 1} = Max(x{step}, x{step})" for step in range(30))
    model = graph(f"agraph (float[B,2,S,8] new) => (float[B,2,S,8] x30) {{ x0 = Neg(new)\n{lines} }}")
    check_new_are_last("keys", model.graph.outputs[0], "S")
