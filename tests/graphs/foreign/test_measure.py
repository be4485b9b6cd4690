"""Sizes are measured, not read from names: what an exporter left out or named in three ways is known after it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs.foreign.measure import measure, name_axes

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
TEXT = (
    HEADER
    + """
agraph (int64[b1,s1] input_ids, int64[b2,t2] attention_mask, int64[b1,s1] position_ids, float[b3,2,p3,8] past, float[32,16] table) => (float y)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] axis = {0}, int64[2] rest = {2, 8}>
{
    hidden = Gather(table, input_ids)
    shape = Shape(hidden)
    batch = Gather(shape, zero)
    new = Gather(shape, one)
    batch1 = Unsqueeze(batch, axis)
    new1 = Unsqueeze(new, axis)
    target = Concat<axis=0>(batch1, new1, rest)
    heads = Reshape(hidden, target)
    turned = Transpose<perm=[0,2,1,3]>(heads)
    keys = Concat<axis=2>(past, turned)
    width = Gather(shape, two)
    half = Div(width, two)
    range = Range(zero, new, one)
    doubled = Concat<axis=1>(input_ids, input_ids)
    y = ReduceSum(keys)
}
"""
)


@pytest.fixture
def measured():
    def make(text=TEXT):
        model = ir.from_onnx_text(text)
        for value in [value for value in model.graph.inputs if value.name == "table"]:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(np.zeros((32, 16), np.float32), name="table")
            model.graph.initializers.add(value)
        name_axes(model)
        measure(model)
        return model

    return make


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden", ["batch_size", "sequence_length", 16]),
        ("heads", ["batch_size", "sequence_length", 2, 8]),
        ("turned", ["batch_size", 2, "sequence_length", 8]),
        ("keys", ["batch_size", 2, "total_sequence_length", 8]),
        ("range", ["sequence_length"]),
        ("doubled", ["batch_size", None]),
        ("target", [4]),
    ],
)
def test_every_value_has_its_shape(measured, name, shape) -> None:
    value = next(output for node in measured().graph for output in node.outputs if output.name == name)
    assert [size if isinstance(size, int) else size.value for size in value.shape] == shape


def test_inputs_are_named_by_what_they_are(measured) -> None:
    axes = {value.name: [size if isinstance(size, int) else size.value for size in value.shape] for value in measured().graph.inputs}
    assert axes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past": ["batch_size", 2, "past_sequence_length", 8],
    }


def test_without_a_cache_the_mask_is_as_long_as_the_tokens(measured) -> None:
    text = TEXT.replace("float[b3,2,p3,8] past, ", "").replace("Concat<axis=2>(past, turned)", "Neg(turned)")
    axes = {value.name: str(value.shape) for value in measured(text).graph.inputs}
    assert axes["attention_mask"] == axes["input_ids"]


def test_what_follows_from_constants_becomes_one(measured) -> None:
    graph = measured().graph
    constants = {name: value.const_value.numpy().tolist() for name, value in graph.initializers.items() if name.endswith(".constant")}
    assert constants == {"width.constant": 16, "half.constant": 8}


@pytest.mark.parametrize(
    "question",
    ["Equal(past_length, zero)", "Greater(new, one)", "Min(new, two)", "Equal(batch, one)", "Max(past_length, one)", "Greater(past_length, large)"],
)
def test_what_depends_on_a_size_at_its_edge_stays_computed(measured, question) -> None:
    """One token, no past, one sequence, a long text: equal at two sizes is not constant."""
    asked = f"past_shape = Shape<start=2, end=3>(past)\n    past_length = Squeeze(past_shape)\n    asked = {question}\n    y = ReduceSum"
    text = TEXT.replace("y = ReduceSum", asked).replace("int64 two = {2}", "int64 two = {2}, int64 large = {4096}")
    assert not any(name.startswith("asked") for name in measured(text).graph.initializers)


def test_fixed_sizes_stay(measured) -> None:
    graph = measured(TEXT.replace("[b1,s1]", "[4,s1]").replace("b2,", "4,").replace("b3,", "4,")).graph
    heads = next(output for node in graph for output in node.outputs if output.name == "heads")
    assert heads.shape[0] == 4


def test_sizes_that_contradict_each_other_are_refused(measured) -> None:
    with pytest.raises(FusionError, match=r"node .* \(Concat\) contradicts its inputs"):
        measured(TEXT.replace("float[b3,2,p3,8] past", "float[b3,3,p3,8] past"))


def test_an_input_that_is_none_of_a_decoders_is_refused(measured) -> None:
    with pytest.raises(FusionError, match=r"input pixels FLOAT \['b', '3', 'h'\] is neither token ids, positions, a mask nor a cache"):
        measured(TEXT.replace("int64[b2,t2] attention_mask", "float[b,3,h] pixels"))
