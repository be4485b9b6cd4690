from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions import _rotary_tables
from graphs.fusions._reading import Refused, Tape
from graphs.fusions._rotary_tables import LARGEST_TABLE_BYTES, check_twice, once

HEAD = (
    "agraph (float[16,8] table, float[1,16,8] deep, float[5,4] angles, int64[2,5] ids, int64[5] row, int64[8] columns, float[8] many,\n"
    " float[5,?] some, float[5,H] named, float[5,4] others) => (y)\n"
    "<float two = {2}, int64[1] nought = {0}, int64[1] one = {1}, int64[1] five = {5}, int64[1] eight = {8}, int64[1] last = {-1},\n"
    " int64[1] back = {-9}, int64[1] step = {2}, int64[1] first_axis = {0}, int64[2] flat = {5, 8}, int64[3] doubled = {1, 1, 2},\n"
    " int64[1] second = {1}, int64[1] ten = {10}>\n{ "
)
HALVES = np.arange(64, dtype=np.float32).reshape(16, 4)
TABLES = {False: np.concatenate((HALVES, HALVES), axis=1), True: HALVES.repeat(2, axis=1)}


@pytest.fixture
def made(graph):
    """A graph whose tables hold each angle twice: as halves, or in pairs."""

    def make(text, paired=False, table=None):
        held = TABLES[paired] if table is None else table
        model = graph(f"{HEAD}{text} }}", constants={"table": held, "deep": held[None]})
        return common_passes.ShapeInferencePass()(model).model

    return make


def accepted(model, paired):
    try:
        check_twice(model.graph.outputs[0], paired)
    except Refused as reason:
        return str(reason)
    return "accepted"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y = Cos(table)", "accepted"),
        ("y = Sin(table)", "accepted"),
        ("y = Cast<to=10>(table)", "accepted"),
        ("y = Mul(table, two)", "accepted"),
        ("y = Div(table, two)", "accepted"),
        ("y = Mul(table, many)", "come from Mul"),
        ("y = Exp(table)", "come from Exp"),
        ("y = Gather(table, row)", "accepted"),
        ("y = Gather<axis=0>(table, ids)", "accepted"),
        ("y = Gather<axis=1>(table, columns)", "come from Gather"),
        ("y = Slice(table, nought, five, first_axis)", "accepted"),
        ("y = Slice(table, last, back, last, last)", "come from Slice"),
        ("y = Slice(table, nought, five)", "come from Slice"),
        ("y = Unsqueeze(table, nought)", "accepted"),
        ("y = Squeeze(deep, nought)", "accepted"),
        ("y = Unsqueeze(table, last)", "come from Unsqueeze"),
        ("y = Neg(table)", "come from Neg"),
    ],
)
@pytest.mark.parametrize("paired", [False, True])
def test_passes_what_computes_each_column_from_itself(made, text, words, paired) -> None:
    assert accepted(made(text, paired), paired).endswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y = Concat<axis=-1>(angles, angles)", "accepted"),
        ("y = Concat<axis=1>(angles, angles)", "accepted"),
        ("y = Concat<axis=0>(angles, angles)", "come from Concat"),
        ("y = Concat<axis=-1>(angles, others)", "come from Concat"),
        ("y = Concat<axis=-1>(angles, angles, angles)", "come from Concat"),
    ],
)
def test_knows_halves_that_are_one(made, text, words) -> None:
    assert accepted(made(text), False).endswith(words)


THIN = "thin = Unsqueeze(angles, last)\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (THIN + "more = Expand(thin, doubled)\n y = Reshape(more, flat)", "accepted"),
        (THIN + "more = Tile(thin, doubled)\n y = Reshape(more, flat)", "accepted"),
        (THIN + "more = Concat<axis=-1>(thin, thin)\n y = Reshape(more, flat)", "accepted"),
        (THIN + "other = Unsqueeze(others, last)\n more = Concat<axis=-1>(thin, other)\n y = Reshape(more, flat)", "come from Reshape"),
        ("thin = Unsqueeze(angles, second)\n more = Concat<axis=1>(thin, thin)\n y = Reshape(more, flat)", "come from Reshape"),
        ("thin = Exp(angles)\n more = Concat<axis=-1>(thin, thin)\n y = Reshape(more, flat)", "come from Reshape"),
        (THIN + "more = Expand(thin, doubled)\n y = Transpose(more)", "come from Transpose"),
        (THIN + "y = Expand(thin, doubled)", "come from Expand"),
        ("y = Reshape(table, flat)", "come from Reshape"),
        ("thin = Unsqueeze(some, last)\n more = Expand(thin, doubled)\n y = Reshape(more, flat)", "come from Reshape"),
        ("thin = Unsqueeze(named, last)\n more = Expand(thin, doubled)\n y = Reshape(more, flat)", "come from Reshape"),
        ("y = Concat<axis=-1>(angles, angles)", "come from Concat"),
    ],
)
def test_knows_elements_that_are_repeated(made, text, words) -> None:
    assert accepted(made(text), True).endswith(words)


def test_another_operator_does_not_repeat_whatever_its_shape(made) -> None:
    model = made(THIN + "more = Neg(thin)\n y = Reshape(more, flat)")
    for value, shape in (("more", [5, 4, 2]), ("y", [5, 8])):
        next(node.outputs[0] for node in model.graph if node.outputs[0].name == value).shape = ir.Shape(shape)
    assert accepted(model, True).endswith("come from Reshape")


@pytest.mark.parametrize("paired", [False, True])
def test_reads_a_table(made, paired, monkeypatch) -> None:
    """Not one that is larger than any that people use, nor one whose angles differ, nor what is fed."""
    assert LARGEST_TABLE_BYTES == 268_435_456
    assert accepted(made("y = Cos(table)", paired), paired) == "accepted"
    assert accepted(made("y = Cos(table)", not paired), paired).endswith("they come from an input")
    for column in (0, 1, 6, 7):
        table = TABLES[paired].copy()
        table[:, column] += 1
        assert accepted(made("y = Cos(table)", table=table), paired).endswith("they come from an input")
    assert accepted(made("y = Cos(angles)"), paired).endswith("they come from an input")
    monkeypatch.setattr(_rotary_tables, "LARGEST_TABLE_BYTES", 512)
    assert accepted(made("y = Cos(table)", paired), paired) == "accepted"
    monkeypatch.setattr(_rotary_tables, "LARGEST_TABLE_BYTES", 511)
    assert accepted(made("y = Cos(table)", paired), paired).endswith("they come from an input")


ONCE = [
    ("y = Cos(table)", {"Slice", "Cos"}, [16, 4]),
    ("y = Gather(table, ids)", {"Slice", "Gather"}, [2, 5, 4]),
    ("rows = Slice(table, nought, ten, first_axis)\n y = Gather(rows, ids)", {"Slice", "Gather"}, [2, 5, 4]),
    ("more = Unsqueeze(table, nought)\n y = Mul(more, two)", {"Slice", "Unsqueeze", "Mul"}, [1, 16, 4]),
]


@pytest.mark.parametrize(("text", "operators", "shape"), ONCE)
@pytest.mark.parametrize("paired", [False, True])
def test_computes_each_angle_once(made, run, text, operators, shape, paired) -> None:
    model = made(text, paired)
    y = model.graph.outputs[0]
    feeds = {value.name: np.zeros(value.shape, np.int64) for value in model.graph.inputs if value.name in ("ids",)}
    tape = Tape(model.graph, y)
    half = once(tape, y, 4, paired)
    assert {node.op_type for node in tape.nodes} == operators
    assert len(tape.nodes) == len(operators)
    assert {str(node.outputs[0].shape) for node in tape.nodes if node.op_type == "Slice"} <= {"[16,4]"}
    assert (half.dtype, list(half.shape)) == (ir.DataType.FLOAT, shape)
    model.graph.extend(tape.nodes)
    model.graph.outputs.append(half)
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)
    whole, part = run(model, {name: feeds[name] for name in feeds if any(value.name == name for value in model.graph.inputs)})
    np.testing.assert_array_equal(part, whole[..., ::2] if paired else whole[..., :4])


@pytest.mark.parametrize(
    "text",
    [
        "y = Slice(table, nought, five, first_axis)",  # not by position: the rows are what is asked for
        "rows = Slice(table, one, ten, first_axis)\n y = Gather(rows, ids)",  # others behind the first would shift
        "rows = Slice(table, nought, ten, first_axis, step)\n y = Gather(rows, ids)",  # so would every second
        "rows = Slice(deep, nought, one, first_axis)\n y = Gather<axis=1>(rows, ids)",  # a table of more axes: rows of which?
        "rows = Slice(table, nought, five, first_axis)\n y = Cos(rows)",
    ],
)
def test_keeps_rows_that_matter(made, text) -> None:
    model = made(text)
    tape = Tape(model.graph, model.graph.outputs[0])
    once(tape, model.graph.outputs[0], 4, False)
    assert [node.op_type for node in tape.nodes].count("Slice") == 2


def test_what_holds_each_angle_once_stays(made) -> None:
    model = made("y = Cos(angles)")
    assert once(Tape(model.graph, model.graph.outputs[0]), model.graph.outputs[0], 4, False) is model.graph.outputs[0]
    model = made("twice = Concat<axis=-1>(angles, angles)\n y = Cos(twice)")
    tape = Tape(model.graph, model.graph.outputs[0])
    assert once(tape, model.graph.outputs[0], 4, False).producer().inputs[0].name == "angles"
