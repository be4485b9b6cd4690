from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions._reading import Refused
from graphs.fusions._repeated_heads import unrepeated

HEAD = (
    "agraph (float[B,2,T,8] key, float[B,1,T,8] single, float[B,2,1,T,8] other, int64[N] fed, float[2,2,T,8] twos) => (y)\n"
    "<int64[1] two = {2}, int64[1] one = {1}, int64[5] groups = {1, 1, 3, 1, 1}, int64[5] tiled = {1, 3, 1, 1, 1}, int64[4] heads = {0, 6, -1, 8},\n"
    " int64[4] turned = {0, -1, 6, 8}, int64[6] each = {0, 0, 0, 1, 1, 1}, int64[6] round = {0, 1, 0, 1, 0, 1}, int64[4] uneven = {0, 0, 0, 1},\n"
    " int64[4] three = {1, 3, 1, 1}, int64[4] two_heads = {0, 2, -1, 8}, int64[5] rows = {1, 1, 1, 3, 1}, int64[5] pair = {1, 1, 2, 1, 1},\n"
    " int64[4] four = {0, 4, -1, 8}, int64[5] pair_first = {1, 2, 1, 1, 1}>\n{ "
)
BEHIND = "key5 = Unsqueeze(key, two)\n"


@pytest.fixture
def value(graph):
    """The output y of a graph, with the shapes that inference can't tell."""

    def make(text, **shapes):
        model = common_passes.ShapeInferencePass()(graph(f"{HEAD}{text} }}")).model
        for node in model.graph:
            for output in node.outputs:
                if output.name in shapes:
                    output.shape = ir.Shape(shapes[output.name])
        return model.graph.outputs[0]

    return make


JOINED = {"y": ["B", 6, "T", 8]}
ROUND = "heads (0, 1, 0, 1, 0, 1) of 2 are gathered: not each one as often as the others, one after the other"
MORE = JOINED | {"more": ["B", 2, 3, "T", 8]}
FIRST = "key5 = Unsqueeze(key, one)\n more = Expand(key5, {})\n y = Reshape(more, {})"
TILED = BEHIND + "more = Tile(key5, groups)\n y = Reshape(more, heads)"
TURNED = BEHIND + "more = Tile(key5, groups)\n y = Reshape(more, turned)"


@pytest.mark.parametrize(
    "text",
    [
        BEHIND + "more = Expand(key5, groups)\n y = Reshape(more, heads)",
        TILED,
        BEHIND + "more = Concat<axis=2>(key5, key5, key5)\n y = Reshape(more, heads)",
        "y = Gather<axis=1>(key, each)",
    ],
)
def test_finds_what_is_repeated(value, text) -> None:
    assert unrepeated(value(text, more=["B", 2, 3, "T", 8], **JOINED)).name == "key"


@pytest.mark.parametrize(
    "text",
    [
        "y = Neg(key)",
        "y = Concat<axis=2>(key, key)",
        "y = Gather<axis=2>(key, each)",
        "y = Gather(key, each)",
        "y = Expand(key, one)",
        "y = Reshape(key, two_heads)",
        "more = Expand(key, one)\n y = Neg(more)",
        "same = Neg(key)\n y = Reshape(same, two_heads)",
        "five = Gather<axis=2>(key, each)\n y = Reshape(five, heads)",
    ],
)
def test_takes_what_is_not_repeated_as_it_is(value, text) -> None:
    assert unrepeated(value(text, y=["B", 2, "T", 8])).name == "y"


def test_takes_a_value_of_another_rank_or_of_unknown_shape_as_it_is(value) -> None:
    assert unrepeated(value(BEHIND + "y = Tile(key5, groups)", y=["B", 2, 3, "T", 8])).name == "y"
    unknown = value("y = Tile(key, fed)")
    unknown.shape = None
    assert unrepeated(unknown).name == "y"


def test_takes_an_input_as_it_is(value) -> None:
    assert unrepeated(value("y = Neg(key)", **JOINED).producer().inputs[0]).name == "key"


@pytest.mark.parametrize("text", ["y = Tile(single, three)", "y = Expand(single, three)"])
def test_one_head_for_all_is_left_to_whoever_reads_it(value, text) -> None:
    """A single head can't be repeated in the wrong order; its repetition stays."""
    assert unrepeated(value(text, y=["B", 3, "T", 8])).name == "y"


@pytest.mark.parametrize(
    ("text", "shapes", "reason"),
    [
        ("y = Tile(key, three)", JOINED, "heads are tiled"),
        ("y = Concat<axis=1>(key, key, key)", JOINED, "heads are tiled"),
        (FIRST.format("tiled", "heads"), JOINED | {"more": ["B", 3, 2, "T", 8]}, "heads are tiled"),
        (FIRST.format("pair_first", "four"),
         {"y": ["B", 4, "T", 8], "more": ["B", 2, 2, "T", 8]}, "heads are tiled"),
        ("y = Gather<axis=1>(key, round)", JOINED, ROUND),
        ("y = Gather<axis=1>(key, uneven)", {"y": ["B", 4, "T", 8]}, "heads (0, 0, 0, 1) of 2 are gathered"),
        ("y = Gather<axis=1>(key, fed)", JOINED, "heads None of 2 are gathered"),
        ("more = Expand(other, groups)\n y = Reshape(more, heads)", MORE, "heads are repeated, but not on a new axis"),
        (BEHIND + "more = Concat<axis=2>(key5, other, key5)\n y = Reshape(more, heads)", MORE,
         "heads are repeated, but not on a new axis"),
        (TILED, JOINED | {"more": ["B", 2, None, "T", 8]}, "shapes of the repeated heads are not known"),
        (TILED, {"more": ["B", 2, 3, "T", 8], "y": ["B", None, "T", 8]}, "are not known"),
        (TILED, JOINED | {"more": ["B", 2, "G", "T", 8]}, "more than the heads changes"),
        (BEHIND + "more = Tile(key5, rows)\n y = Reshape(more, heads)", JOINED | {"more": ["B", 2, 1, "U", 8]}, "more than the heads changes"),
        (TURNED, {"more": ["B", 2, 3, "T", 8], "y": ["B", "T", 6, 8]}, "more than the heads changes"),
        (TURNED, {"more": ["B", 2, 3, "T", 8], "y": ["B", 5, "T", 8]}, "more than the heads changes"),
    ],
)  # fmt: skip
def test_refuses_with_a_reason(value, text, shapes, reason) -> None:
    repeated = value(text, **shapes)
    with pytest.raises(Refused) as refused:
        unrepeated(repeated)
    assert reason in str(refused.value)


def test_refuses_heads_of_unknown_number(value) -> None:
    repeated = value("y = Gather<axis=1>(key, each)", **JOINED)
    repeated.producer().inputs[0].shape = ir.Shape(["B", "K", "T", 8])
    with pytest.raises(Refused, match="heads \\(0, 0, 0, 1, 1, 1\\) of K are gathered"):
        unrepeated(repeated)


def test_gathered_heads_are_each_one_repeated() -> None:
    """What the rule relies on: np.repeat, not np.tile."""
    key = np.arange(2)[:, None]
    np.testing.assert_array_equal(key[[0, 0, 0, 1, 1, 1]], np.repeat(key, 3, axis=0))
