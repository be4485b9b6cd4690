"""engines/plan_loading.py: what a plan needs before it runs, on a runtime that says what it was asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.errors import EngineError
from artifact.hashing import sha256_of
from engines.plan_loading import load_engine

LOGGER = SimpleNamespace(last=lambda: "its last word")


class FakeTensorRT:
    """Records what is asked of it."""

    def __init__(self, *, loads: bool = True, refits: bool = True) -> None:
        self.refitted: list[str] = []
        self.engine = SimpleNamespace(get_weight_streaming_automatic_budget=lambda: 77)
        self.runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine if loads else None)
        self._refits = refits

    def Runtime(self, logger: Any) -> Any:
        return self.runtime

    def Refitter(self, engine: Any, logger: Any) -> Any:
        assert engine is self.engine
        return SimpleNamespace(refit_cuda_engine=lambda: self._refits)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        return SimpleNamespace(refit_from_file=lambda graph: self.refitted.append(graph) or True)


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "x.plan").write_bytes(b"plan")
    (tmp_path / "fused-engine.onnx").write_bytes(b"graph")
    return {"file": "x.plan", "graph": "fused-engine.onnx", "graph_sha256": sha256_of(tmp_path / "fused-engine.onnx"), "flags": {}}


def load(trt: FakeTensorRT, folder: Path, entry: dict[str, Any], **flags: bool) -> Any:
    return load_engine(trt, LOGGER, folder, {**entry, "flags": flags})  # type: ignore[arg-type]


def test_a_plain_plan_is_only_loaded(tmp_path: Path, entry: dict[str, Any]) -> None:
    trt = FakeTensorRT()
    assert load(trt, tmp_path, entry) == (trt.runtime, trt.engine)
    assert not trt.refitted
    assert not hasattr(trt.runtime, "engine_host_code_allowed")
    assert not hasattr(trt.engine, "weight_streaming_budget_v2")


def test_each_flag_asks_for_its_own(tmp_path: Path, entry: dict[str, Any]) -> None:
    trt = FakeTensorRT()
    load(trt, tmp_path, entry, version_compatible=True, strip_weights=True, weight_streaming=True)
    assert trt.runtime.engine_host_code_allowed is True
    assert trt.refitted == [str(tmp_path / "fused-engine.onnx")]
    assert trt.engine.weight_streaming_budget_v2 == 77


def test_weights_come_back_from_the_very_graph_alone(tmp_path: Path, entry: dict[str, Any]) -> None:
    trt = FakeTensorRT()
    (tmp_path / "fused-engine.onnx").write_bytes(b"another")
    with pytest.raises(EngineError, match=r"fused-engine\.onnx is not the graph that it was built from \(SHA-256 .*…, expected"):
        load(trt, tmp_path, entry, strip_weights=True)
    (tmp_path / "fused-engine.onnx").unlink()
    with pytest.raises(EngineError, match=r"built without its weights, and fused-engine\.onnx, which holds them, is not there"):
        load(trt, tmp_path, entry, strip_weights=True)
    assert not trt.refitted


def test_what_the_runtime_refuses_is_told_in_its_words(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="the runtime can't load it: its last word"):
        load(FakeTensorRT(loads=False), tmp_path, entry)
    with pytest.raises(EngineError, match="can't be put back: its last word") as error:
        load(FakeTensorRT(refits=False), tmp_path, entry, strip_weights=True)
    assert error.value.hint == "build it without --strip-weights"
