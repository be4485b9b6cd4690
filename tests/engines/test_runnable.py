"""Why a plan can't run here: each reason alone, in the words that the runner refuses with, and nothing of it by loading the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.errors import EngineError
from artifact.hashing import sha256_of
from engines import runnable
from engines.device import Device
from engines.runnable import foreign_files, obstacles, why_not_here
from engines.runner import Plan

A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
H100 = Device("NVIDIA H100", (9, 0), 80 * 2**30)
NO_GPU = "no NVIDIA driver here: libcuda.so.1"
Entry = dict[str, Any]


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A plan and its graph, with the runtime that built it installed."""
    monkeypatch.setattr(runnable, "runtime_module", lambda backend: SimpleNamespace(__version__="1.7.1.116"))
    (tmp_path / "p.plan").write_bytes(b"plan")
    (tmp_path / "g.onnx").write_bytes(b"graph")
    return {
        "file": "p.plan", "plan_sha256": sha256_of(tmp_path / "p.plan"), "graph": "g.onnx", "graph_sha256": sha256_of(tmp_path / "g.onnx"),
        "compute_capability": "8.0", "target": "a100-80gb", "backend": "tensorrt-rtx", "tensorrt_version": "1.7.1.116",
    }  # fmt: skip


def test_nothing_hinders_a_plan_on_its_own_gpu(tmp_path: Path, entry: Entry) -> None:
    assert why_not_here(tmp_path, entry, A100) is None


@pytest.mark.parametrize(
    ("device", "change", "spoil", "words"),
    [
        (NO_GPU, {}, None, NO_GPU),
        (H100, {}, None, "built for compute capability 8.0 (a100-80gb), this GPU (NVIDIA H100) has 9.0"),
        (A100, {}, lambda folder: (folder / "p.plan").unlink(), "p.plan is not there"),
        (A100, {}, lambda folder: (folder / "p.plan").write_bytes(b"plane"), "p.plan is not the plan that was built (SHA-256 "),
        (A100, {}, lambda folder: (folder / "g.onnx").write_bytes(b"graphs"), "g.onnx is not the graph that p.plan was built from (SHA-256 "),
        (A100, {"tensorrt_version": "1.6.0"}, None, "built by tensorrt-rtx 1.6.0, here is 1.7.1.116"),
        (A100, {"backend": "other"}, None, "no runtime is known for plans of 'other'"),
    ],
)
def test_each_reason_is_said_and_the_runner_refuses_with_it(
    tmp_path: Path, entry: Entry, device: Any, change: Entry, spoil: Callable[[Path], Any] | None, words: str
) -> None:
    if spoil is not None:
        spoil(tmp_path)
    (reason,) = obstacles(tmp_path, entry | change, device)
    assert reason.startswith(words)
    assert why_not_here(tmp_path, entry | change, device) == reason
    with pytest.raises(EngineError) as refused:
        Plan(tmp_path, entry | change, device)
    assert str(refused.value) == f"p.plan can't run here: {reason}"


def test_all_reasons_are_found_and_the_first_is_looked_for_alone(tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.plan").write_bytes(b"other")
    assert len(list(obstacles(tmp_path, entry | {"tensorrt_version": "1"}, H100))) == 3
    monkeypatch.setattr(runnable, "sha256_of", lambda path: pytest.fail("hashed, although the GPU is another one"))
    assert why_not_here(tmp_path, entry, H100)


@pytest.mark.parametrize(("built_by", "fits"), [("1.6.9", True), ("1.7.1.116", True), ("1.8", False)])
def test_a_version_compatible_plan_runs_on_a_later_release(tmp_path: Path, entry: Entry, built_by: str, fits: bool) -> None:
    reason = why_not_here(tmp_path, entry | {"tensorrt_version": built_by, "flags": {"version_compatible": True}}, A100)
    assert (reason is None) is fits


def test_a_plan_may_be_without_its_graph_and_without_a_recorded_one(tmp_path: Path, entry: Entry) -> None:
    (tmp_path / "g.onnx").unlink()
    assert list(foreign_files(tmp_path, entry)) == []
    del entry["graph"], entry["graph_sha256"]
    assert list(foreign_files(tmp_path, entry)) == []
