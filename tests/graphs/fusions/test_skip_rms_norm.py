"""A residual sum and the norm behind it become one node; the sum stays readable; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.fusions import skip_rms_norm
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

E = 8
TEXT = """g ({t}[B,S,8] x, {t}{y} y, {t}[{w}] w) => ({t}[B,S,8] z)
{{ sum = Add(x, y) normed = RMSNormalization<axis={axis}, epsilon=0.001, stash_type={stash}>(sum, w) z = Add(normed, sum) }}"""
DEFAULTS = {"t": "float", "y": "[B,S,8]", "w": "8", "axis": -1, "stash": 1}


def make(graph, random, **changes):
    fields = DEFAULTS | changes
    floats = np.float32 if fields["t"] == "float" else np.float16
    model = graph(TEXT.format(**fields), {"w": random(8, dtype=floats)})
    model.graph[0].outputs[0].shape = model.graph.inputs[0].shape
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
    assert list(last.inputs) == [node.outputs[0], node.outputs[3]]
    (after,) = run(model, given)
    np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"y": "[8]"}, "the sum is of ('B', 'S', 8) and (8,), not of two hidden states [B, S, E]"),
        ({"axis": 1, "w": "S,8"}, "the norm is not over the last axis"),
        ({"stash": 10}, "the norm does not compute in FLOAT"),
    ],
)
def test_refuses_with_a_reason(graph, random, changes, reason):
    model = make(graph, random, **changes)
    result = apply_reader(model, skip_rms_norm)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])


def test_norm_of_anything_else_is_no_candidate(graph):
    model = graph("g (float[B,S,8] x, float[8] w) => (float[B,S,8] z) { m = Mul(x, x) z = RMSNormalization(m, w) }")
    assert not any(skip_rms_norm.is_candidate(node) for node in model.graph)
