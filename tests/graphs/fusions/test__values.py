from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import _values
from graphs.fusions._values import SMALL_CONSTANT


@pytest.fixture
def made(graph):
    """A small graph; its values by name."""
    text = (
        "agraph (float[B,?,8] x, float[2] fed) => (twice)\n<float three = {3}, int64[2] two = {1, 2}, int64[64] most = {"
        + ", ".join("1" * SMALL_CONSTANT) + "}, int64[65] more = {" + ", ".join("1" * (SMALL_CONSTANT + 1)) + "}>\n"
        "{ cast = Cast<to=10>(x)\n minus = Neg(cast)\n once = Abs(minus)\n twice = Add(once, once) }"
    )  # fmt: skip
    model = graph(text)
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(node.outputs[0] for node in model.graph)]
    return {value.name: value for value in values}


@pytest.mark.parametrize(
    ("name", "elements", "number"), [("three", (3,), 3), ("two", (1, 2), None), ("fed", None, None), ("more", None, None), ("cast", None, None)]
)
def test_reads_small_constants(made, name, elements, number) -> None:
    assert _values.numbers(made[name]) == elements
    assert _values.scalar(made[name]) == number


def test_reads_no_more_than_small_ones_and_nothing_outside_the_graph(made) -> None:
    assert _values.numbers(made["most"]) == (1,) * SMALL_CONSTANT
    outside = ir.ExternalTensor("nowhere.bin", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="w")
    assert _values.numbers(ir.Value(name="w", const_value=outside)) is None
    assert _values.numbers(None) is None
    assert _values.scalar(None) is None


def test_reads_shapes(made) -> None:
    assert _values.sizes(made["x"]) == ("B", None, 8)
    assert (_values.rank(made["x"]), _values.last_size(made["x"])) == (3, 8)
    for unknown in (made["cast"], None):
        assert (_values.sizes(unknown), _values.rank(unknown), _values.last_size(unknown)) == (None, None, None)
    assert _values.last_size(made["three"]) is None
    assert _values.rank(made["three"]) == 0


def test_finds_producers_and_users(made) -> None:
    assert _values.producer(made["minus"], "Neg") is made["minus"].producer()
    assert _values.producer(made["minus"], "Abs") is None
    assert _values.producer(made["x"], "Neg") is None
    assert _values.producer(None, "Neg") is None
    assert _values.node_of(made["minus"]) is made["minus"].producer()
    assert _values.only_user(made["minus"], "Abs") is made["once"].producer()
    assert _values.only_user(made["minus"], "Add") is None
    assert _values.only_user(made["once"], "Add") is None  # it is read twice
    assert _values.only_user(made["twice"], "Add") is None


def test_reads_what_a_cast_makes(made) -> None:
    assert _values.cast_to(made["cast"]) == ir.DataType.FLOAT16
    assert _values.cast_to(made["minus"]) is None
    assert _values.cast_to(None) is None


@pytest.mark.parametrize(
    ("axis", "name", "last"),
    [(-1, "x", True), (2, "x", True), (1, "x", False), (3, "x", False), (-1, "cast", True), (2, "cast", False), (None, "x", False), (-2, "x", False)],
)
def test_knows_the_last_axis(made, axis, name, last) -> None:
    assert _values.is_last_axis(axis, made[name]) == last


def test_keeps_modules(made) -> None:
    value = made["minus"]
    assert _values.module_of(value) == ""
    assert _values.module_of(made["x"]) == ""
    assert _values.in_module(value, "a.b", ir.DataType.FLOAT, (1, "S")) is value
    assert (_values.module_of(value), value.dtype, _values.sizes(value)) == ("a.b", ir.DataType.FLOAT, (1, "S"))
    _values.in_module(value, "")
    assert (_values.module_of(value), value.dtype, _values.sizes(value)) == ("a.b", ir.DataType.FLOAT, (1, "S"))
    _values.in_module(made["once"], "")
    assert MODULE_KEY not in made["once"].producer().metadata_props
    assert (made["once"].type, made["once"].shape) == (None, None)


@pytest.mark.parametrize(("shape", "before"), [("same", "x"), ("other", "y"), ("fed", "y"), (None, "x")], ids=["unchanged", "split", "fed", "none"])
def test_looks_behind_a_reshape_that_changes_nothing(graph, shape, before) -> None:
    text = f"agraph (float[B,2,T,8] x, int64[4] fed, int64[4] same, int64[4] other) => (y) {{ y = {f'Reshape(x, {shape})' if shape else 'Neg(x)'} }}"
    model = graph(text, {"same": np.zeros(4, np.int64), "other": np.array([0, 0, -1, 4])})
    found = _values.unreshaped(model.graph.inputs[0] if shape is None else model.graph.outputs[0])
    assert found.name == before
    assert _values.unreshaped(None) is None


def test_makes_shapes() -> None:
    class Op:
        def initializer(self, tensor):
            return tensor

    tensor = _values.shape_constant(Op(), "named", [0, 2])
    assert (tensor.name, tensor.dtype, tensor.numpy().tolist()) == ("named", ir.DataType.INT64, [0, 2])
    assert tensor.numpy().dtype == np.int64
