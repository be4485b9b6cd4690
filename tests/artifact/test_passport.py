"""The passport binds checkpoint, graphs, plan and verdict; of what changed since, it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.manifest import read_manifest, write_manifest
from artifact.passport import PASSPORTS, content_hash, passports_of
from artifact.steps import Report, StepContext, run_step
from artifact.unread import forget_step

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
             "compute_capability": "8.0", "tensorrt_version": "1.7", "profiles": {}, "max_batch": 4, "plan_sha256": "",
             "graph": "int8-engine.onnx"}  # fmt: skip
    with step.write(entry["file"]) as path:
        path.write_text("plan")
    entry["plan_sha256"] = step.outputs[entry["file"]]["sha256"]
    with step.write(f"{FOLDER}/build.json") as path:
        path.write_text(json.dumps({"engines": [entry]}))
    return {"engines": [entry], "passed": True}


PLAN_STAGE = "engine a100-80gb-int8"
OWN = {"traced": True, "fused": True, "int8": True, "int8-engine": True}


def judge(hashes: dict[str, str], stages: dict[str, bool | None], *, passed: bool | None = True, **more: Any) -> Any:
    def validate(step: StepContext) -> Report:
        with step.write("reports/parity.json") as path:
            path.write_text("{}")
        found = [{"stage": stage, "passed": outcome} for stage, outcome in stages.items()]
        idle = [{"stage": stage, "reason": "no GPU"} for stage in (PLAN_STAGE, "engine other") if stage not in stages]
        report = {"passed": passed, "verdict": "passed" if passed else "failed", "headline": "h", "created": "now", "hashes": hashes}
        return {**report, "stages": found, "not_run": idle, **more}

    return validate


def judged(artifact: Path, hashes: dict[str, str], stages: dict[str, bool | None], **more: Any) -> dict[str, Any]:
    run_step(artifact, "validate", {}, judge(hashes, stages, **more), force=True)
    found: dict[str, Any] = passport(artifact)["parity"]
    return found


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
    parity = judged(artifact, graphs, {**OWN, "int4": True})
    assert (parity["passed"], parity["words"]) == (True, "passed; h")
    assert parity["stages"] == OWN
    assert parity["not_run"] == {PLAN_STAGE: "no GPU"}
    assert parity["report_sha256"] == read_manifest(artifact)["steps"]["validate"]["outputs"]["reports/parity.json"]["sha256"]
    parity = judged(artifact, graphs | {"int8.onnx": "other"}, OWN)
    assert (parity["passed"], parity["words"]) == (None, "the report is of another int8.onnx: validate again")


@pytest.mark.parametrize("missing", ["int8.onnx", "int8-engine.onnx"])
def test_what_the_report_left_out_is_no_verdict(artifact: Path, missing: str) -> None:
    hashes = {file: digest for file, digest in passport(artifact)["graphs"].items() if file != missing}
    parity = judged(artifact, hashes, {stage: True for stage in OWN if f"{stage}.onnx" != missing})
    assert parity["passed"] is None
    assert parity["words"] == f"not measured: {missing} is not in the report; validate again, without --stage"


def test_another_engines_failure_is_not_this_ones_and_its_own_is(artifact: Path) -> None:
    graphs = passport(artifact)["graphs"]
    parity = judged(artifact, graphs, {**OWN, "int4": False}, passed=False)
    assert parity["passed"] is True
    assert parity["words"] == "passed: traced, fused, int8, int8-engine; the report as a whole: failed; h"
    other = {"passed": False, "failed": [{"file": "int4.onnx"}]}
    assert judged(artifact, graphs, OWN, passed=False, checksums=other)["passed"] is True
    assert judged(artifact, graphs, {**OWN, "int8": False}, passed=False)["passed"] is False
    assert judged(artifact, graphs, {**OWN, "int8": None}, passed=True)["passed"] is None
    assert judged(artifact, graphs, OWN, passed=False, floor={"check": {"passed": False}})["passed"] is False
    assert judged(artifact, graphs, OWN, passed=False, checksums={"failed": [{"file": "weights/layer-00.safetensors"}]})["passed"] is False


def test_what_was_measured_on_the_gpu_is_of_the_plans_that_are_there(artifact: Path) -> None:
    graphs, plan = passport(artifact)["graphs"], passport(artifact)["plans"][0]["plan_sha256"]
    entry = {"folder": "a100-80gb-int8", "plan_sha256": plan}
    assert judged(artifact, graphs, {**OWN, PLAN_STAGE: True}, engines=[entry])["passed"] is True
    parity = judged(artifact, graphs, {**OWN, PLAN_STAGE: True}, engines=[entry | {"plan_sha256": "before"}])
    assert (parity["passed"], parity["words"]) == (None, "the report is of another plan, built again since: validate again")


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
