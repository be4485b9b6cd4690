"""`fuse --graph --min-tensorrt`: graphs of other exporters in the operators of an older release, with their own names and numbers."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from graphs.foreign.fuse import fuse_graph
from graphs.lower import OLD_OPSET
from graphs.tensorrt_releases import LATER

LAYERS = 2
NAMES = ["dynamo-18-bare", "dynamo-18-eager-float16", "dynamo-18-sdpa-float32", "dynamo-23-sdpa-float32", "optimum-14", "optimum-18"]


@pytest.mark.parametrize("name", NAMES)
def test_only_older_operators_are_left_and_the_numbers_stay(pinned, tools, tmp_path, name) -> None:
    out = tmp_path / "out.onnx"
    report = fuse_graph(pinned(name), out, min_tensorrt="10.0")
    assert report["lowered"] == {"RMSNormalization": 2 * LAYERS + 1, "RotaryEmbedding": 2 * LAYERS, "Attention": LAYERS}
    assert report["needs_tensorrt"]["release"] == "10.0"
    model = ir.load(out)
    assert not LATER.keys() & {node.op_type for node in model.graph}
    assert model.opset_imports == {"": OLD_OPSET}
    assert tools["interface"](out) == tools["interface"](pinned(name))
    onnx.checker.check_model(out, full_check=True)
    scenarios = ["batch", "left-padded"] if name.endswith("bare") else ["prefill", "decode", "chunk", "left-padded"]
    for scenario in scenarios:
        limit = 2**-7 if name.endswith("float16") else 1e-5
        assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= limit


def test_a_graph_that_was_fused_here_can_be_lowered_and_fused_again(pinned, tools, tmp_path) -> None:
    fuse_graph(pinned("optimum-18"), tmp_path / "fused.onnx")
    assert fuse_graph(tmp_path / "fused.onnx", tmp_path / "lowered.onnx", min_tensorrt="10.0")["out"] == str(tmp_path / "lowered.onnx")
    again = fuse_graph(tmp_path / "lowered.onnx", tmp_path / "again.onnx")
    assert {rule["rule"]: rule["fired"] for rule in again["rules"]}.items() >= {"rms_norm": 5, "rotary": 4, "attention": 2}.items()
    assert tools["worst_difference"](pinned("optimum-18"), tmp_path / "again.onnx", tools["scenarios"]["chunk"]) <= 1e-5
