"""engines/build.py: a whole build step on a tiny artifact, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.errors import ArtifactError, EngineError
from artifact.hashing import sha256_of
from artifact.manifest import write_manifest
from artifact.steps import StepContext
from commands.summary import summarize
from engines.build import build_engine, choose_backend
from engines.engine_options import EngineOptions

Make = Callable[..., Any]


def artifact_of(make_stage: Make, folder: Path, precision: str, *, split_last: bool = False, kv_cache: str = "dynamic") -> StepContext:
    stage = make_stage(folder, 1, precision, split_last=split_last, kv_cache=kv_cache)
    model = {"name": "tiny", "source": "random", "format": "random", "fingerprint": "0", "dtype": "fp16", "config": asdict(stage.config)}
    model["kv_cache"] = kv_cache
    write_manifest(folder, {"format": 1, "model": model, "steps": {}})
    return StepContext(folder)


@pytest.mark.parametrize(("precision", "stage"), [("fp16", "fused"), ("int8", "int8")])
def test_build_engine_writes_graph_plan_and_record(make_stage: Make, tmp_path: Path, precision: str, stage: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = artifact_of(make_stage, tmp_path, precision)
    told: list[str] = []
    step.progress = lambda what, done, total: told.append(what)
    report = build_engine(step, EngineOptions(precision=precision, target="a100", max_batch=2))
    (engine,) = report["engines"]
    plan = tmp_path / engine["file"]
    assert engine["file"] == f"engines/a100-80gb-{precision}/part-00.plan"
    assert list(step.outputs) == [f"{stage}-engine.onnx", engine["file"], f"engines/a100-80gb-{precision}/build.json"]
    assert json.loads((plan.parent / "build.json").read_text()) == json.loads(json.dumps(report))
    assert report["passed"] is True
    assert (engine["bytes"], engine["plan_sha256"]) == (plan.stat().st_size, sha256_of(plan))
    assert (engine["compute_capability"], engine["max_batch"], engine["max_length"]) == ("8.0", 2, 256)
    assert engine["profiles"]["decode"]["sequence_length"] == (1, 1, 1)
    assert engine["peak_anonymous_mb"] < engine["peak_rss_mb"] < 2000
    assert {"Building engine", "auditing the plan"} <= set(told)
    assert engine["network_layers"] > 50
    layers = next(sheet for sheet in summarize("build", report) if sheet.columns[:2] == ("profile", "where"))
    assert layers.rows[2][:3] == ("decode", "layer 0", "9")
    assert ("gemm int8" if precision == "int8" else "gemm half") in layers.rows[2][3]


def test_int8_for_one_row_is_built_for_two_and_says_so(make_stage: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    (engine,) = build_engine(artifact_of(make_stage, tmp_path, "int8"), EngineOptions(precision="int8", target="a100", max_batch=1))["engines"]
    assert engine["audit"]["passed"]
    assert engine["max_batch"] == 1
    assert all(axes["batch_size"] == (1, 1, 2) for axes in engine["profiles"].values())
    assert len(engine["notes"]) == 1
    assert "admit 2 rows" in engine["notes"][0]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_static_cache_is_built_at_its_capacity_and_written_in_place(make_stage: Make, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = artifact_of(make_stage, tmp_path, precision, kv_cache="static")
    report = build_engine(step, EngineOptions(precision=precision, target="a100", max_batch=3, capacity=96))
    assert report["passed"] is True
    (engine,) = report["engines"]
    recorded = json.loads((tmp_path / engine["file"]).with_name("build.json").read_text())["engines"][0]
    row = 1 * 2 * 2 * 96 * 64 * 2  # one layer's keys and values, heads, slots, head_dim, float16
    expected = {"kv_cache": "static", "capacity": 96, "kv_cache_bytes_per_row": row, "kv_cache_bytes": 3 * row, "max_length": 96}
    assert {key: recorded[key] for key in expected} == expected
    assert (recorded["attention_by_lengths"], recorded["caches_in_place"]) == (1, 2)
    assert {name: axes["cache_capacity"] for name, axes in engine["profiles"].items()} == {"prefill": (96,) * 3, "decode": (96,) * 3}
    assert engine["profiles"]["prefill"]["sequence_length"] == (1, 96, 96)
    assert [kernels.get("_gemm_mha_v2", 0) + kernels.get("_gemv_mha_v1", 0) for kernels in engine["kernels_by_profile"].values()] == [1, 1]
    caches = [value for value in ir.load(tmp_path / engine["graph"]).graph.inputs if value.name.startswith("past")]
    assert [str(value.shape) for value in caches] == ["[batch_size,2,96,64]"] * 2


@pytest.mark.parametrize(
    ("kv_cache", "options", "words", "hint"),
    [
        ("static", {}, "a static cache needs --capacity", "--capacity 256"),
        ("static", {"capacity": 64, "max_length": 128}, "--max-length is for a dynamic cache", "--capacity 128"),
        ("static", {"capacity": 257}, "--capacity must be between 2 and the model's 256 positions, got 257", "--capacity 256"),
        ("dynamic", {"capacity": 64}, "--capacity is for a static cache; the cache of this artifact is dynamic", "--max-length 64"),
    ],
)
def test_each_cache_form_has_its_own_bound(make_stage: Make, tmp_path: Path, kv_cache: str, options: dict[str, Any], words: str, hint: str) -> None:
    step = artifact_of(make_stage, tmp_path, "fp16", kv_cache=kv_cache)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EngineError, match=words) as error:
        build_engine(step, EngineOptions(precision="fp16", target="a100", **options))
    assert error.value.hint is not None
    assert hint in error.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_audit_is_not_passed(make_stage: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    report = build_engine(artifact_of(make_stage, tmp_path, "fp16", split_last=True), EngineOptions(precision="fp16", target="a100", max_batch=1))
    assert report["passed"] is False
    assert (tmp_path / report["engines"][0]["file"]).exists()


def test_names_the_command_that_makes_a_missing_stage(make_stage: Make, tmp_path: Path) -> None:
    step = artifact_of(make_stage, tmp_path, "fp16")
    with pytest.raises(ArtifactError, match=r"has no int8\.onnx") as error:
        build_engine(step, EngineOptions(precision="int8", target="a100"))
    assert error.value.hint is not None
    assert "quantize" in error.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "no precision 'fp8'; there is: fp16, int8, int8-smoothquant, int4, fp32"),
        ({"target": "h100"}, "no target 'h100'"),
        ({"backend": "tvm"}, "no backend 'tvm'; there is: auto, tensorrt-rtx"),
        ({"max_length": 257}, "256 positions, got 257"),
        ({"max_length": 0}, "256 positions, got 0"),
    ],
)
def test_refuses_bad_options_and_writes_nothing(make_stage: Make, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    step = artifact_of(make_stage, tmp_path, "fp16")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EngineError, match=words):
        build_engine(step, EngineOptions(**{"precision": "fp16", "target": "a100", **options}))
    assert sorted(tmp_path.rglob("*")) == before


def test_says_how_to_install_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt_rtx.find_spec", lambda name: None if name == "tensorrt_rtx" else find_spec(name))
    with pytest.raises(EngineError, match="tensorrt-rtx-cu12 not installed") as error:
        choose_backend("auto")
    assert error.value.hint == "pip install tensorrt-rtx-cu12 polygraphy"
