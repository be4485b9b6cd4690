from __future__ import annotations

import onnx_ir as ir
import pytest

from graphs.fusions import _reading
from graphs.fusions._reading import Refused, Tape, apply_reader

TEXT = """
agraph (float[B,S,8] x, float[8] fed) => (last)
<float two = {2}, float half = {0.5}, int64[1] axis = {-1}, int64[2] pair = {3, 4}>
{
    one = Neg(x)
    scaled = Mul(one, two)
    again = Mul(half, scaled)
    divided = Div(again, two)
    under = Div(two, divided)
    product = Mul(one, under)
    cast = Cast<to=1>(product)
    same = Identity(cast)
    mean = ReduceMean(same, axis)
    all = ReduceMean(same)
    lone = Slice(same, axis, axis)
    read = Add(mean, all)
    twice = Add(lone, lone)
    last = Sub(read, twice)
}
"""


@pytest.fixture
def values(graph):
    """The values of the graph above, by name."""
    model = graph(TEXT)
    return {value.name: value for value in [*model.graph.inputs, *model.graph.initializers.values(), *(node.outputs[0] for node in model.graph)]}


def test_finds_the_one_user(values) -> None:
    assert _reading.user(values["one"], "Mul") is None  # two
    assert _reading.user(values["lone"], "Add") is values["twice"].producer()  # one node, which reads it twice
    assert _reading.user(values["same"], "Slice", "Exp") is values["lone"].producer()
    assert _reading.user(values["same"], "Exp") is None
    assert _reading.need_user(values["same"], "Slice", otherwise="none") is values["lone"].producer()
    with pytest.raises(Refused, match="there is none"):
        _reading.need_user(values["same"], "Exp", otherwise="there is none")


def test_finds_what_is_behind(values) -> None:
    assert _reading.need(values["one"], "Neg", "Abs", otherwise="none") is values["one"].producer()
    for value, kind in ((values["one"], "Abs"), (values["x"], "Neg"), (None, "Neg")):
        with pytest.raises(Refused, match="there is none"):
            _reading.need(value, kind, otherwise="there is none")
    assert [_reading.op_of(value) for value in (values["one"], values["x"], None)] == ["Neg", "", ""]
    assert _reading.first(values["scaled"].producer()) is values["one"]
    assert _reading.through(values["same"], "Identity", "Cast") is values["product"]
    assert _reading.through(values["same"], "Identity") is values["cast"]
    assert _reading.through(values["x"], "Identity") is values["x"]
    assert _reading.operands(values["scaled"], "Mul") == (values["one"], values["two"])
    assert _reading.operands(values["scaled"], "Add") is None


def test_finds_the_other_operand(values) -> None:
    product = values["product"].producer()
    assert _reading.other(product, values["one"]) is values["under"]
    assert _reading.other(product, values["under"]) is values["one"]
    assert _reading.other(product, values["x"]) is None
    assert _reading.other(values["twice"].producer(), values["lone"]) is values["lone"]


def test_reads_constant_inputs(values) -> None:
    assert _reading.constants(values["mean"].producer(), 1) == (-1,)
    assert _reading.constants(values["mean"].producer(), 0) is None
    assert _reading.constants(values["all"].producer(), 1) is None
    assert _reading.constants(values["all"].producer(), 1, (7,)) == (7,)
    assert _reading.constants(values["mean"].producer(), 2, (7,)) == (7,)


def test_reads_shapes(values) -> None:
    assert _reading.shape_of(values["x"]) == ("B", "S", 8)
    assert _reading.shape_of(values["one"]) == _reading.shape_of(None) == ()


def test_multiplies_scales(values) -> None:
    assert _reading.scaled(values["divided"]) == (values["one"], 0.5)
    assert _reading.scaled(values["again"]) == (values["one"], 1.0)
    assert _reading.scaled(values["under"]) == (values["under"], 1.0)  # two over it is no multiple of it
    assert _reading.scaled(values["product"]) == (values["product"], 1.0)
    assert _reading.scaled(values["x"]) == (values["x"], 1.0)


def test_a_tape_takes_the_place_of_a_value(graph) -> None:
    model = graph("agraph (float[2] x) => (float[2] y) { [old] y = Neg(x) }")
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    tape = Tape(model.graph, y)
    first = tape.add("Reshape", x, [2], None, like=x, shape=(2,), allowzero=1)
    tape.add("Slice", first, [0], [2])
    number = tape.constant(0.5, ir.DataType.FLOAT16)
    tape.finish()
    reshape, cut = model.graph
    assert [node.name for node in model.graph] == ["y.Reshape_0", "old"]
    assert (first.name, first.dtype, str(first.shape)) == ("y.Reshape_0", ir.DataType.FLOAT, "[2]")
    assert reshape.attributes.get_int("allowzero") == 1
    assert reshape.inputs[2] is None
    assert [
        (value.name, value.dtype, str(value.shape), value.const_value.numpy().tolist()) for value in (reshape.inputs[1], *cut.inputs[1:], number)
    ] == [
        ("y.constant_1", ir.DataType.INT64, "[1]", [2]),
        ("y.constant_2", ir.DataType.INT64, "[1]", [0]),
        ("y.constant_3", ir.DataType.INT64, "[1]", [2]),
        ("y.constant_4", ir.DataType.FLOAT16, "[]", 0.5),
    ]
    assert set(model.graph.initializers) == {f"y.constant_{number}" for number in (1, 2, 3, 4)}
    assert (model.graph.outputs[0].name, model.graph.outputs[0].producer(), cut.outputs[0].shape is not None) == ("y", cut, True)


def test_a_new_value_is_of_no_type_if_nothing_is_said(graph) -> None:
    model = graph("agraph (float[2] x) => (float[2] y) { y = Neg(x) }")
    made = Tape(model.graph, model.graph.outputs[0]).add("Abs", model.graph.inputs[0])
    assert (made.type, made.shape) == (None, None)


class Doubled:
    """Negations of x become sums; those of other values are refused."""

    def is_candidate(self, node):
        return node.op_type == "Neg"

    def read(self, node):
        if node.inputs[0].name != "x":
            raise Refused("it is not of x")
        return node

    def rewrite(self, graph, found):
        tape = Tape(graph, found.outputs[0])
        tape.add("Add", found.inputs[0], found.inputs[0])
        tape.finish()


def test_a_reader_is_applied_to_every_candidate(graph) -> None:
    text = "agraph (float[2] x, float[2] z) => (a, b, c)\n{ idle = Exp(x)\n a = Neg(x)\n [named] b = Neg(z)\n c = Neg(b) }"
    model = graph(text)
    result = apply_reader(model, Doubled())
    assert [node.op_type for node in model.graph] == ["Add", "Neg", "Neg"]  # what leads nowhere is gone
    assert result.fired == 1
    assert [(refusal.node, refusal.reason) for refusal in result.refused] == [
        ("named", "it is not of x"),
        (model.graph.node(2).name or "Neg", "it is not of x"),
    ]
