from __future__ import annotations

import numpy as np
import onnx_ir as ir

from artifact.layout import MODULE_KEY
from graphs.cleanup import clean_up

TEXT = """<ir_version: 11, opset_import: ["" : 23]>
agraph (float[B,4] x) => (float[B,2] y)
<int64[2] shape_a = {0, 4}, int64[2] shape_b = {0, 4}, int64[2] shape_c = {0, 2}, float[2] ones = {1, 1}, float[4] unused = {1, 1, 1, 1}>
{
    a = Reshape(x, shape_a)
    b = Reshape(a, shape_b)
    dead = Neg(b)
    c = Reshape(b, shape_c)
    y = Mul(c, ones)
}
"""


def model_with_metadata() -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.0"
        node.metadata_props["pkg.onnxscript.rewriter.rule_name"] = "something"
    return model


def test_shares_equal_constants_and_drops_what_is_unused() -> None:
    model = model_with_metadata()
    clean_up(model)
    assert [node.name for node in model.graph] == [
        "model.layers.0.Reshape",
        "model.layers.0.Reshape_2",
        "model.layers.0.Reshape_3",
        "model.layers.0.Mul",
    ]
    assert {name: value.const_value.numpy().tolist() for name, value in model.graph.initializers.items()} == {
        "constant_0": [0, 4],
        "constant_1": [0, 2],
        "constant_2": [1.0, 1.0],
    }
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_leaves_no_metadata_but_the_module() -> None:
    model = model_with_metadata()
    clean_up(model)
    assert [dict(node.metadata_props) for node in model.graph] == [{MODULE_KEY: "model.layers.0"}] * 4


def test_keeps_equal_constants_of_other_types_and_shapes_apart() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
    agraph (float[1] x) => (float[1] y) <float[1] a = {0}, float b = {0}, int32[1] c = {0}, int64[1] d = {0}> {
        p = Add(x, a)
        q = Add(p, b)
        r = Cast<to=1>(c)
        s = Add(q, r)
        y = Unsqueeze(s, d)
    }"""
    model = ir.from_onnx_text(text)
    clean_up(model)
    assert len(model.graph.initializers) == 4


def test_weights_keep_their_names_and_are_not_shared(tmp_path) -> None:
    """Two norms of ones are two weights."""
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]>\nagraph (float[4] x, float[4] a, float[4] b) => (float[4] y) { p = Mul(x, a)\n y = Mul(p, b) }'
    )
    np.ones(8, np.float32).tofile(tmp_path / "weights.bin")
    for index, value in enumerate(list(model.graph.inputs)[1:]):
        model.graph.inputs.remove(value)
        value.name = f"model.layers.{index}.input_layernorm.weight"
        value.const_value = ir.ExternalTensor(
            "weights.bin", 16 * index, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name=value.name, base_dir=tmp_path
        )
        model.graph.initializers.add(value)
    clean_up(model)
    assert list(model.graph.initializers) == ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]
