"""A residual sum and the norm behind it become one node; the sum stays readable; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions import skip_rms_norm
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

E = 8
TEXT = """g ({t}{x} x, {t}{y} y, {t}[{w}] w) => ({t}{x} z)
{{ sum = Add(x, y) normed = RMSNormalization{attributes}(sum, w) z = Add(normed, sum) }}"""
DEFAULTS = {"t": "float", "x": "[B,S,8]", "y": "[B,S,8]", "w": "8", "attributes": "<axis=-1, epsilon=0.001, stash_type=1>"}


def make(graph, random, **changes):
    fields = DEFAULTS | changes
    floats = np.float32 if fields["t"] == "float" else np.float16
    model = graph(TEXT.format(**fields), {"w": random(8, dtype=floats)})
    for value in (output for node in model.graph for output in node.outputs):
        value.type, value.shape = model.graph.inputs[0].type, model.graph.inputs[0].shape
    for node in model.graph:
        node.name, node.metadata_props["module"] = node.outputs[0].name, f"model.{node.outputs[0].name}"
    return model


@pytest.mark.parametrize(("dtype", "floats", "tolerance"), [("float", np.float32, 1e-5), ("float16", np.float16, 4e-3)])
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, dtype, floats, tolerance):
    model = make(graph, random, t=dtype)
    given = {"x": random(2, 3, E, dtype=floats), "y": random(2, 3, E, dtype=floats)}
    (before,) = run(model, given)
    result = apply_reader(model, skip_rms_norm)
    assert (result.fired, result.refused) == (1, [])
    node, last = model.graph
    assert (node.op_type, node.domain, node.metadata_props["module"]) == ("SkipSimplifiedLayerNormalization", CONTRIB, "model.normed")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"epsilon": pytest.approx(1e-3)}
    assert [value.name for value in node.outputs] == ["normed", "", "", "sum"]
    dtype_and_shape = (ir.DataType.from_numpy(np.dtype(floats)), ["B", "S", E])
    assert [(value.dtype, value.shape) for value in (node.outputs[0], node.outputs[3])] == [dtype_and_shape] * 2
    assert list(last.inputs) == [node.outputs[0], node.outputs[3]]
    (after,) = run(model, given)
    np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"y": "[8]"}, "the sum is of ('B', 'S', 8) and (8,), not of two hidden states [B, S, E]"),
        ({"x": "[S,8]", "y": "[S,8]"}, "the sum is of ('S', 8) and ('S', 8), not of two hidden states [B, S, E]"),
        ({"attributes": "<axis=1>", "w": "S,8"}, "the norm is not over the last axis"),
        ({"attributes": "<stash_type=10>"}, "the norm does not compute in FLOAT"),
    ],
)
def test_refuses_with_a_reason(graph, random, changes, reason):
    model = make(graph, random, **changes)
    result = apply_reader(model, skip_rms_norm)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])


def test_what_a_norm_does_not_say_is_as_onnx_has_it(graph, random):
    model = make(graph, random, attributes="")
    assert apply_reader(model, skip_rms_norm).fired == 1
    assert model.graph[0].attributes["epsilon"].value == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["m = Mul(x, x) z = RMSNormalization(m, w)", "m = Add(x, x) z = Mul(m, w)"], ids=["another operand", "no norm"])
def test_anything_but_a_norm_of_a_sum_is_no_candidate(graph, text):
    model = graph(f"g (float[B,S,8] x, float[8] w) => (float[B,S,8] z) {{ {text} }}")
    assert not any(skip_rms_norm.is_candidate(node) for node in model.graph)
