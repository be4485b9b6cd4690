"""engines/backends/tensorrt_rtx.py with the real compiler: what it builds, and what it says when it can't."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.errors import EngineError
from artifact.progress import silent
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.profiles import make_profiles
from engines.targets import Target, find_target

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
Make = Callable[..., Any]
HEAD = '<ir_version: 11, opset_import: ["" : 23]>\n'


def request(graph: Path, plan: Path, stage: Any = None, target: Target | None = None) -> BuildRequest:
    profiles = tuple(make_profiles(stage.config, "fp16", max_batch=2, max_length=256)) if stage else ()
    return BuildRequest(graph, plan, target or find_target("a100"), profiles)


def test_leaves_the_environment_and_this_process_alone(built: Callable[..., tuple[Any, Path]]) -> None:
    built(1)
    assert "POLYGRAPHY_USE_TENSORRT_RTX" not in os.environ


def test_plan_is_for_the_asked_capability_without_tf32(built: Callable[..., tuple[Any, Path]]) -> None:
    _, plan = built(1)
    content = plan.read_bytes()
    assert content.count(b"accelerators={sm80 }") == 2
    assert content.count(b"tf32=0\n") == 2
    assert b"tf32=1" not in content


def test_parse_error_names_node_and_operator(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ir.from_onnx_text(HEAD + "g (float16[1,4] x, float16[1,4] y) => (float16[1,4] z) { a = Add(x, y)\n z = MatMulNBits(a) }")
    for node in model.graph:
        node.name = f"my_{node.op_type}"
        node.domain = "com.microsoft" if node.op_type == "MatMulNBits" else ""
    model.graph.opset_imports["com.microsoft"] = 1
    ir.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=r"odd\.onnx: TensorRT can't parse node 'my_MatMulNBits' \(MatMulNBits\)"):
        TensorRTRTX().build(request(tmp_path / "odd.onnx", tmp_path / "odd.plan"), silent)
    assert any(record.levelno == logging.ERROR for record in caplog.records)  # TensorRT's own words, bridged


def test_a_missing_profile_is_an_error_in_tensorrts_words(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "fp16")
    with pytest.raises(EngineError, match="no optimization profile has been defined"):
        TensorRTRTX().build(request(stage.engine_graph, tmp_path / "x.plan"), silent)


def test_an_unknown_capability_is_refused(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "fp16")
    h100 = Target("h100", (9, 0), 80, 3350, 989, 1979)
    with pytest.raises(EngineError, match=r"SM90.* not supported"):
        TensorRTRTX().build(request(stage.engine_graph, tmp_path / "x.plan", stage, h100), silent)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here: a full disk can't be staged")
def test_a_full_disk_is_told(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "fp16")
    with pytest.raises(EngineError, match="No space left on device"):
        TensorRTRTX().build(request(stage.engine_graph, Path("/dev/full"), stage), silent)


def test_version_is_the_distributions() -> None:
    import tensorrt_rtx

    assert TensorRTRTX().version() == tensorrt_rtx.__version__
