"""Operators by layer of graphs that name no modules: known by the norms, where each is one node; otherwise said not to be known."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphs.foreign.fuse import fuse_graph
from graphs.layers import UNKNOWN, layer_operators


@pytest.mark.parametrize("name", ["optimum-18", "dynamo-18-eager-float16", "dynamo-23-sdpa-float32"])
def test_layers_of_a_foreign_graph_are_those_between_norms(pinned, tmp_path, name) -> None:
    report = fuse_graph(pinned(name), tmp_path / "out.onnx")["layer_operators"]
    assert report["known_by"] == "norms"
    (group,) = report["groups"]
    assert group["layers"] == [0, 1]
    expected = {"RMSNormalization": 2, "RotaryEmbedding": 2, "Attention": 1, "Sigmoid": 1, "MatMul": 7, "Add": 2}
    assert {op_type: group["operators"][op_type] for op_type in expected} == expected
    assert report["outside"]["RMSNormalization"] == 1
    assert report["outside"]["MatMul"] == 1 + name.startswith("optimum")  # lm_head, and optimum multiplies positions and frequencies so
    model = ir.load(tmp_path / "out.onnx")
    assert sum(group["operators"].values()) * 2 + sum(report["outside"].values()) == model.graph.num_nodes()


def test_layers_of_an_unfused_foreign_graph_are_not_known_and_that_is_said(pinned) -> None:
    found = layer_operators(ir.load(pinned("optimum-18")))
    assert (found.known_by, found.groups) == (None, ())
    assert found.lines()[0] == f"layers: {UNKNOWN}"
    assert found.lines()[1].startswith("whole graph: ")
