"""The precision that judges a graph, told by its weights, its operators and its caches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs.foreign.ports import read_ports
from graphs.foreign.precision import read_precision


def precision(model):
    return read_precision(model, read_ports(model))


def insert(model, op_type, weight, *, domain="", position=0, **attributes):
    """Put an operator that reads a weight among the nodes."""
    value = ir.Value(name="packed", const_value=ir.tensor(weight, name="packed"))
    model.graph.initializers.add(value)
    inputs = [model.graph.inputs[0]] * position + [value]
    model.graph.append(ir.Node(domain, op_type, inputs, [ir.AttrInt64(name, number) for name, number in attributes.items()]))
    return model


@pytest.mark.parametrize(("name", "kind"), [("optimum-18", "float32"), ("genai", "float32"), ("dynamo-18-eager-float16", "float16")])
def test_tells_floats_by_weights_and_caches(pinned, name, kind) -> None:
    found = precision(ir.load(pinned(name)))
    assert (found.kind, found.activations) == (kind, kind)
    assert found.found.startswith(f"caches and logits are 9 {kind}, weight matrices ")


def test_float16_weights_alone_make_it_float16(pinned) -> None:
    model = ir.load(pinned("optimum-18"))
    weight = model.graph.initializers["model.embed_tokens.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float16))
    found = precision(model)
    assert (found.kind, found.activations) == ("float16", "float32")


INT4 = np.zeros((8, 4), np.uint8)
QUANTISED = {
    "int8": [("DequantizeLinear", np.zeros((4, 4), np.int8), {}), ("MatMulNBits", INT4, {"position": 1, "bits": 8, "domain": "com.microsoft"})],
    "int4": [
        ("MatMulNBits", INT4, {"position": 1, "bits": 4, "domain": "com.microsoft"}),
        ("GatherBlockQuantized", INT4, {"domain": "com.microsoft"}),
        ("MatMulNBits", INT4, {"position": 1, "bits": 2, "domain": "com.microsoft"}),
    ],
    "int8-smoothquant": [("MatMulInteger", np.zeros((4, 4), np.int8), {"position": 1})],
}


@pytest.mark.parametrize(("kind", "operator"), [(kind, each) for kind, operators in QUANTISED.items() for each in operators])
def test_tells_quantised_weights_by_who_reads_them(pinned, kind, operator) -> None:
    op_type, weight, options = operator
    found = precision(insert(ir.load(pinned("optimum-18")), op_type, weight, **options))
    assert found.kind == kind
    assert found.found.startswith(f"1 × {op_type} {kind}; ")


def test_the_lowest_width_decides(pinned) -> None:
    model = insert(ir.load(pinned("optimum-18")), "DequantizeLinear", np.zeros((4, 4), np.int8))
    assert precision(insert(model, "MatMulNBits", INT4, position=1, bits=4, domain="com.microsoft")).kind == "int4"


def test_a_dequantised_vector_is_no_weight(pinned) -> None:
    assert precision(insert(ir.load(pinned("optimum-18")), "DequantizeLinear", np.zeros(4, np.int8))).kind == "float32"


def test_refuses_bfloat16(pinned) -> None:
    model = ir.load(pinned("optimum-18"))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    with pytest.raises(FusionError, match="bfloat16 is not judged here: weight matrices are 16 float32, caches and logits 9 bfloat16"):
        precision(model)
