"""Opset 23, and nothing left that does nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from artifact.errors import FusionError
from graphs.foreign.prepare import drop_idle_nodes, prepare, raise_opset
from graphs.foreign.source import open_graph

BODY = (
    "agraph (float[2,5] x) => (float[2,5] y)\n<float one = {1}, int64[1] zero = {0}, int64[1] five = {5}, int64[1] axis = {1}, int64[1] minus = {-1},"
)
BODY += " int64[1] end = {-9}, int64[2] same = {2, 5}, int64[1] step = {1}> { z = OPERATION\n y = Neg(z) }"
TEXT = '<ir_version: 10, opset_import: ["" : 23]>\n' + BODY


@pytest.mark.parametrize(
    ("operation", "idle"),
    [
        ("Identity(x)", True),
        ("Cast<to=1>(x)", True),
        ("Cast<to=10>(x)", False),
        ("Slice(x, zero, five, axis, step)", True),
        ("Slice(x, step, five, axis, step)", False),
        ("Slice(x, minus, end, axis, minus)", False),  # backwards: the same size, other elements
        ("Expand(x, same)", True),
        ("Reshape(x, same)", True),
        ("Mul(x, one)", True),
        ("Div(x, one)", True),
        ("Mul(x, x)", False),
        ("Add(x, one)", False),
    ],
)
def test_drops_only_what_returns_its_input(operation, idle) -> None:
    text = TEXT.replace("OPERATION", operation)
    model = ir.from_onnx_text(text.replace("(float[2,5] y)", "(float16[2,5] y)") if "to=10" in operation else text)
    model = common_passes.ShapeInferencePass()(model).model
    drop_idle_nodes(model)
    assert [node.op_type for node in model.graph] == (["Neg"] if idle else [operation.partition("(")[0].partition("<")[0], "Neg"])


def test_an_output_keeps_its_node() -> None:
    model = ir.from_onnx_text(TEXT.replace("z = OPERATION\n y = Neg(z)", "y = Identity(x)"))
    drop_idle_nodes(model)
    assert model.graph.outputs[0].producer().op_type == "Identity"


@pytest.mark.parametrize(("name", "before"), [("optimum-14", 14), ("optimum-18", 18), ("dynamo-23-sdpa-float32", 23)])
def test_opset_is_23(pinned, name, before) -> None:
    model = open_graph(pinned(name))
    assert model.opset_imports[""] == before
    prepare(model)
    assert model.opset_imports[""] == 23


def test_a_newer_opset_stays(pinned) -> None:
    model = open_graph(pinned("dynamo-23-sdpa-float32"))
    model.opset_imports[""] = 24
    prepare(model)
    assert model.opset_imports[""] == 24


def test_an_operator_without_a_form_in_opset_23_is_refused() -> None:
    """No opset has this one."""
    text = '<ir_version: 4, opset_import: ["" : 8]>\nagraph (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Scan13(x) }'
    with pytest.raises(FusionError, match="opset 8 can't be raised to 23: Failed to convert") as failure:
        raise_opset(ir.from_onnx_text(text))
    assert failure.value.hint == "export the model again with opset 23"


def test_a_node_that_the_converter_skips_is_refused() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]>\nagraph (x, scale, bias) => (y) { y = GroupNormalization<num_groups=2>(x, scale, bias) }'
    with pytest.raises(FusionError, match="opset 20 can't be raised to 23: Skipping version conversion for node GroupNormalization"):
        raise_opset(ir.from_onnx_text(text))
