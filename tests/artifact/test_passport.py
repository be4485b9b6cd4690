"""The passport binds checkpoint, graphs, plan and verdict; of what changed since, it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.manifest import read_manifest, write_manifest
from artifact.passport import PASSPORTS, content_hash, passports_of
from artifact.steps import Report, StepContext, forget_step, run_step

FOLDER = "engines/a100-80gb-int8"
MODEL = {"name": "tiny", "source": "demo", "format": "gguf", "fingerprint": "f00d", "dtype": "fp16", "config": {}}


def write(step: StepContext, **files: str) -> None:
    for name, text in files.items():
        with step.write(name.replace("__", "/").replace("_onnx", ".onnx")) as path:
            path.write_text(text)


def export(step: StepContext) -> Report:
    write(step, traced_onnx="traced", weights__checksums="w")
    (step.artifact / "weights/checksums").rename(step.artifact / "weights/checksums.json")
    step.outputs["weights/checksums.json"] = step.outputs.pop("weights/checksums")
    write_manifest(step.artifact, read_manifest(step.artifact) | {"model": MODEL})
    return {}


def build(step: StepContext) -> Report:
    with step.write("int8-engine.onnx") as path:
        path.write_text("engine")
    entry = {"file": f"{FOLDER}/part-00.plan", "precision": "int8", "target": "a100-80gb", "backend": "tensorrt-rtx", "bytes": 4,
             "compute_capability": "8.0", "tensorrt_version": "1.7", "profiles": {}, "max_batch": 4, "plan_sha256": "", "graph": "x"}  # fmt: skip
    with step.write(entry["file"]) as path:
        path.write_text("plan")
    entry["plan_sha256"] = step.outputs[entry["file"]]["sha256"]
    with step.write(f"{FOLDER}/build.json") as path:
        path.write_text(json.dumps({"engines": [entry]}))
    return {"engines": [entry], "passed": True}


def judge(hashes: dict[str, str], stage: str = "int8") -> Any:
    def validate(step: StepContext) -> Report:
        with step.write("reports/parity.json") as path:
            path.write_text("{}")
        stages = [{"stage": stage, "passed": True}, {"stage": "int4", "passed": True}]
        idle = [{"stage": "engine a100-80gb-int8", "reason": "no GPU"}, {"stage": "engine other", "reason": "no GPU"}]
        return {"passed": True, "verdict": "passed", "headline": "h", "created": "now", "stages": stages, "not_run": idle, "hashes": hashes}

    return validate


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    run_step(tmp_path, "export", {"dtype": "fp16"}, export)
    run_step(tmp_path, "fuse", {}, lambda step: write(step, fused_onnx="fused") or {})
    run_step(tmp_path, "quantize-int8", {}, lambda step: write(step, int8_onnx="int8") or {}, inputs=("fused.onnx",))
    run_step(tmp_path, "quantize-int4", {}, lambda step: write(step, int4_onnx="int4") or {}, inputs=("fused.onnx",))
    run_step(tmp_path, "build-a100-80gb-int8", {"target": "a100-80gb"}, build, inputs=("int8.onnx", "weights/*"))
    return tmp_path


def passport(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(artifact)[PASSPORTS]["a100-80gb-int8"]
    return found


def test_passport_binds_what_the_plan_was_made_of_and_nothing_else(artifact: Path) -> None:
    found, steps = passport(artifact), read_manifest(artifact)["steps"]
    assert found["checkpoint"] == {key: MODEL[key] for key in ("name", "source", "format", "fingerprint", "dtype")}
    assert set(found["graphs"]) == {"traced.onnx", "fused.onnx", "int8.onnx", "int8-engine.onnx"}
    assert found["graphs"]["fused.onnx"] == steps["fuse"]["outputs"]["fused.onnx"]["sha256"]
    (plan,) = found["plans"]
    assert plan["plan_sha256"] == steps["build-a100-80gb-int8"]["outputs"][f"{FOLDER}/part-00.plan"]["sha256"]
    assert len(plan["content_sha256"]) == 64
    assert "content_sha256" in found["plan_bytes"]
    assert (found["compute_capability"], found["tensorrt_version"], found["precision"]) == ("8.0", "1.7", "int8")
    assert set(found["tools"]) == {"export", "fuse", "quantize-int8", "build-a100-80gb-int8"}
    assert found["parity"] == {"passed": None, "words": "not validated yet"}
    assert found["stale"] is None


def test_verdict_is_of_these_graphs_alone(artifact: Path) -> None:
    graphs = passport(artifact)["graphs"]
    run_step(artifact, "validate", {}, judge(graphs), force=True)
    parity = passport(artifact)["parity"]
    assert (parity["passed"], parity["words"]) == (True, "passed; h")
    assert parity["stages"] == {"int8": True}
    assert parity["not_run"] == {"engine a100-80gb-int8": "no GPU"}
    assert parity["report_sha256"] == read_manifest(artifact)["steps"]["validate"]["outputs"]["reports/parity.json"]["sha256"]
    run_step(artifact, "validate", {}, judge(graphs | {"int8.onnx": "other"}), force=True)
    assert passport(artifact)["parity"]["words"] == "the report is of another int8.onnx: validate again"
    assert passport(artifact)["parity"]["passed"] is None


def test_passport_says_when_a_step_before_was_done_anew(artifact: Path) -> None:
    run_step(artifact, "fuse", {}, lambda step: write(step, fused_onnx="other") or {}, force=True)
    assert "stale" in passport(artifact)["stale"]


def test_passport_goes_with_its_engine_and_is_made_for_older_artifacts(artifact: Path) -> None:
    recorded = read_manifest(artifact)
    without = {key: value for key, value in recorded.items() if key != PASSPORTS}
    assert passports_of(artifact, without) == recorded[PASSPORTS]
    forget_step(artifact, "build-a100-80gb-int8")
    assert PASSPORTS not in read_manifest(artifact)


def test_content_is_of_kernels_and_sizes_not_of_time_or_the_plans_own_bytes() -> None:
    entry = {"bytes": 4, "kernels_by_profile": {"decode": {"a": 1, "b": 2}}, "build_s": 1.0, "peak_rss_mb": 7, "plan_sha256": "1"}
    again = {"kernels_by_profile": {"decode": {"b": 2, "a": 1}}, "bytes": 4, "build_s": 2.0, "peak_rss_mb": 8, "plan_sha256": "2"}
    assert content_hash(entry) == content_hash(again)
    for key, value in (("bytes", 5), ("kernels_by_profile", {"decode": {"a": 1}}), ("graph_sha256", "x")):
        assert content_hash(entry | {key: value}) != content_hash(entry)
