"""engines/build.py: a whole build step on a tiny artifact, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.errors import ArtifactError, EngineError
from artifact.hashing import sha256_of
from artifact.io_spec import present_layer
from artifact.journal import Journal
from artifact.layout import MODULE_KEY
from artifact.manifest import read_manifest, write_manifest
from artifact.progress import Progress
from artifact.steps import StepContext
from commands.part_graphs import write_part_graphs
from commands.summary import summarize
from engines.backends import allocator
from engines.backends.allocator import mimalloc
from engines.backends.flags import BuildFlags
from engines.backends.protocol import BuildRequest, BuildResult
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.build import build_engine, choose_backend
from engines.build_cost import ADDED_GEMV_MEMORY, Graph, build_cost
from engines.decode_gemv import SUFFIX
from engines.engine_options import EngineOptions
from engines.graph_weights import weights_bytes

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
    report = build_engine(step, EngineOptions(precision=precision, target="a100", max_batch=2), write_part_graphs)
    (engine,) = report["engines"]
    plan = tmp_path / engine["file"]
    assert engine["file"] == f"engines/a100-80gb-{precision}/part-00.plan"
    graphs = [f"{stage}-engine.onnx", *(["fused-engine-gemv.onnx"] if precision == "fp16" else [])]
    assert list(step.outputs) == [*graphs, engine["file"], f"engines/a100-80gb-{precision}/build.json"]
    assert json.loads((plan.parent / "build.json").read_text()) == json.loads(json.dumps(report))
    assert report["passed"] is True
    assert (engine["bytes"], engine["plan_sha256"]) == (plan.stat().st_size, sha256_of(plan))
    assert (engine["compute_capability"], engine["max_batch"], engine["max_length"]) == ("8.0", 2, 256)
    assert engine["profiles"]["decode"]["sequence_length"] == (1, 1, 1)
    assert engine["peak_anonymous_mb"] < engine["peak_rss_mb"] < 2000
    assert {"Building engine", "auditing the plan"} <= set(told)
    assert engine["network_layers"] > 50
    assert engine["allocator"].startswith("the system's" if mimalloc() is None else "mimalloc ")
    layers = next(sheet for sheet in summarize("build", report) if sheet.columns[:2] == ("profile", "where"))
    assert layers.rows[2][:3] == ("decode", "layer 0", "9" if precision == "int8" else "8")
    assert ("gemm int8" if precision == "int8" else "gemm half") in layers.rows[2][3]


@pytest.mark.parametrize(("asked", "max_batch", "gemv"), [(None, 2, True), (None, 5, False), (True, 5, True), (False, 2, False)])
def test_decode_multiplies_by_a_vector_where_that_is_faster_or_asked_for(
    make_stage: Make, tmp_path: Path, asked: bool | None, max_batch: int, gemv: bool
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = artifact_of(make_stage, tmp_path, "fp16")
    options = EngineOptions(precision="fp16", target="a100", max_batch=max_batch, flags=BuildFlags(decode_gemv=asked))
    (engine,) = build_engine(step, options, write_part_graphs)["engines"]
    assert engine["audit"]["passed"] is True
    once = ["__myl_GtrCastMaxr"] if gemv else []  # not again for each product
    assert [name for name in engine["kernels_by_profile"]["decode"] if "Gtr" in name] == once
    graph = f"fused-engine{'-gemv' * gemv}.onnx"
    graphs = ["fused-engine.onnx", graph][: 1 + gemv]
    assert list(step.outputs) == [*graphs, "engines/a100-80gb-fp16/part-00.plan", "engines/a100-80gb-fp16/build.json"]
    assert not any(str(node.name).endswith(SUFFIX) for node in ir.load(tmp_path / "fused-engine.onnx").graph)
    assert (engine["flags"]["decode_gemv"], engine["graph"]) == (gemv, graph)
    assert any(str(node.name).endswith(SUFFIX) for node in ir.load(tmp_path / graph).graph) is gemv
    assert [engine["profiles"][name]["sequence_length"][0] for name in ("prefill", "decode")] == [2 if gemv else 1, 1]
    assert [note.split(",")[0] for note in engine["notes"]] == ["decode multiplies by a vector"] * gemv


def test_int8_for_one_row_is_built_for_two_and_says_so(make_stage: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    (engine,) = build_engine(
        artifact_of(make_stage, tmp_path, "int8"), EngineOptions(precision="int8", target="a100", max_batch=1), write_part_graphs
    )["engines"]
    assert engine["audit"]["passed"]
    assert engine["max_batch"] == 1
    assert all(axes["batch_size"] == (1, 1, 2) for axes in engine["profiles"].values())
    assert len(engine["notes"]) == 1
    assert "admit 2 rows" in engine["notes"][0]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_static_cache_is_built_at_its_capacity_and_written_in_place(make_stage: Make, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = artifact_of(make_stage, tmp_path, precision, kv_cache="static")
    report = build_engine(step, EngineOptions(precision=precision, target="a100", max_batch=3, capacity=96), write_part_graphs)
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
        build_engine(step, EngineOptions(precision="fp16", target="a100", **options), write_part_graphs)
    assert error.value.hint is not None
    assert hint in error.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_audit_is_not_passed(make_stage: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    report = build_engine(
        artifact_of(make_stage, tmp_path, "fp16", split_last=True), EngineOptions(precision="fp16", target="a100", max_batch=1), write_part_graphs
    )
    assert report["passed"] is False
    assert (tmp_path / report["engines"][0]["file"]).exists()


def test_names_the_command_that_makes_a_missing_stage(make_stage: Make, tmp_path: Path) -> None:
    step = artifact_of(make_stage, tmp_path, "fp16")
    with pytest.raises(ArtifactError, match=r"has no int8\.onnx") as error:
        build_engine(step, EngineOptions(precision="int8", target="a100"), write_part_graphs)
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
        build_engine(step, EngineOptions(**{"precision": "fp16", "target": "a100", **options}), write_part_graphs)
    assert sorted(tmp_path.rglob("*")) == before


def test_says_how_to_install_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.tensorrt_rtx.find_spec", lambda name: None if name == "tensorrt_rtx" else find_spec(name))
    with pytest.raises(EngineError, match="tensorrt-rtx-cu12 not installed") as error:
        choose_backend("auto")
    assert error.value.hint == "pip install tensorrt-rtx-cu12 polygraphy"


def parts_artifact(make_stage: Make, folder: Path, precision: str = "fp16", layers: int = 3, **form: Any) -> StepContext:
    stage = make_stage(folder, layers, precision, **form)
    graph = ir.load(stage.path)
    for node in graph.graph:  # as an export names them: every node that gives a cache is its layer's
        layer = present_layer(str(node.outputs[0].name))
        if layer is not None:
            node.metadata_props[MODULE_KEY] = f"model.layers.{layer}"
        elif node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            node.metadata_props[MODULE_KEY] = "model.embed_tokens"
        if re.fullmatch(r"l\d+_out", str(node.outputs[0].name)):
            node.outputs[0].shape = ir.Shape(["batch_size", "sequence_length", stage.config.hidden_size])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    ir.save(graph, stage.path)
    model = {"name": "tiny", "source": "random", "format": "random", "fingerprint": "0", "dtype": "fp16", "config": asdict(stage.config)}
    write_manifest(folder, {"format": 1, "model": model | {"kv_cache": stage.kv_cache}, "steps": {}})
    return StepContext(folder)


@pytest.mark.parametrize(("precision", "kv_cache"), [("fp16", "dynamic"), ("int8", "static")])
def test_parts_are_plans_of_their_own_and_audited(make_stage: Make, tmp_path: Path, precision: str, kv_cache: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = parts_artifact(make_stage, tmp_path, precision, kv_cache=kv_cache)
    capacity = 96 if kv_cache == "static" else None
    report = build_engine(step, EngineOptions(precision=precision, target="a100", parts=2, capacity=capacity), write_part_graphs)
    assert report["passed"] is True, [check for engine in report["engines"] for check in engine["audit"]["checks"] if check["passed"] is False]
    assert (report["parts_reason"], len(report["engines"])) == ("--parts 2", 2)
    first, second = report["parts"]
    assert first["layers"][0] == 0
    assert (first["layers"][1] + 1, second["layers"][1]) == (second["layers"][0], 2)
    boundary = f"hidden_states.{second['layers'][0]}"
    assert (first["outputs"][0], second["inputs"][0], second["outputs"][0]) == (boundary, boundary, "logits")
    assert "input_ids" in first["inputs"]
    assert "input_ids" not in second["inputs"]
    for part, (line, engine) in enumerate(zip(report["parts"], report["engines"], strict=True)):
        assert (line["file"], engine["part"]) == (engine["file"], part)
        assert engine["file"].endswith(f"part-{part:02}.plan")
        graph = ir.load(tmp_path / line["graph"]).graph
        assert [{value.name for value in values} for values in (graph.inputs, graph.outputs)] == [set(line["inputs"]), set(line["outputs"])]
        kernels = engine["kernels_by_profile"]["decode"]
        assert kernels["_gemv_mha_v1"] == line["layers"][1] - line["layers"][0] + 1
    assert json.loads((tmp_path / first["file"]).with_name("build.json").read_text())["parts"] == json.loads(json.dumps(report["parts"]))
    assert sum(f"layers {one['layers'][0]}–{one['layers'][1]}" in str(summarize("build", report)) for one in report["parts"]) == 2


def test_a_build_that_broke_off_goes_on_with_the_parts_that_are_missing(make_stage: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    folder, wanted = tmp_path, {"options": {"parts": None}}
    options = EngineOptions(precision="fp16", target="a100", max_batch=2, parts=2)
    built = TensorRTRTX.build
    plans: list[str] = []

    def build(backend: TensorRTRTX, request: BuildRequest, progress: Progress) -> BuildResult:
        plans.append(request.graph.name)
        if len(plans) == 2:
            raise EngineError("the plan can't be written: no space left")
        return built(backend, request, progress)

    monkeypatch.setattr(TensorRTRTX, "build", build)
    step = parts_artifact(make_stage, folder)
    step.journal = Journal.reopen(folder, "build-a100-80gb-fp16", wanted, set())
    with pytest.raises(EngineError, match="no space left"):
        build_engine(step, options, write_part_graphs)
    before = (folder / "engines/a100-80gb-fp16/part-00.plan").stat().st_mtime_ns
    again = StepContext(folder, journal=Journal.reopen(folder, "build-a100-80gb-fp16", wanted, set()))
    report = build_engine(again, replace(options, parts=None), write_part_graphs)  # the split is the one that was begun
    assert plans == ["fused-engine-layers-00-01.onnx", *["fused-engine-layers-02-02.onnx"] * 2]
    assert (folder / report["engines"][0]["file"]).stat().st_mtime_ns == before
    assert [engine["plan_sha256"] for engine in report["engines"]] == [sha256_of(folder / engine["file"]) for engine in report["engines"]]
    assert report["passed"] is True
    assert report["parts_reason"] == "2 parts, as an interrupted build had begun"


def test_memory_that_was_asked_for_cuts_the_model(make_stage: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"the largest of 3 parts needs about 0\.5 GB of memory, more than --max-memory 0\.1 GB"):
        build_engine(parts_artifact(make_stage, tmp_path), EngineOptions(precision="fp16", target="a100", max_memory=10**8), write_part_graphs)


def test_an_engine_whose_decode_multiplies_by_a_vector_is_not_cut(make_stage: Make, tmp_path: Path) -> None:
    options = EngineOptions(precision="fp16", target="a100", max_memory=10**8, flags=BuildFlags(decode_gemv=True))
    with pytest.raises(EngineError, match=r"of 3 parts needs about 0\.5 GB of memory, more than --max-memory 0\.1 GB"):
        build_engine(parts_artifact(make_stage, tmp_path), options, write_part_graphs)
    options = replace(options, max_memory=472 * 10**6)
    with pytest.raises(EngineError, match="--decode-gemv is for an engine in one plan, and this one takes") as error:
        build_engine(parts_artifact(make_stage, tmp_path / "more"), options, write_part_graphs)
    assert error.value.hint == "leave out --decode-gemv"
    assert not list((tmp_path / "more").glob("*engine*"))


def test_where_it_would_take_several_plans_decode_keeps_its_gemm(make_stage: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = parts_artifact(make_stage, tmp_path)
    usual = build_cost(Graph(weights_bytes(ir.load(tmp_path / "fused.onnx").graph), 3, "fp16")).memory_bytes
    options = EngineOptions(precision="fp16", target="a100", max_batch=2, max_memory=usual + ADDED_GEMV_MEMORY)
    report = build_engine(step, options, write_part_graphs)
    assert [engine["flags"]["decode_gemv"] for engine in report["engines"]] == [False]


def test_lowered_attention_and_a_decode_that_multiplies_by_a_vector_were_not_tried(make_stage: Make, tmp_path: Path) -> None:
    step = artifact_of(make_stage, tmp_path, "fp16")
    manifest = read_manifest(tmp_path)
    manifest["steps"]["fuse"] = {"report": {"min_tensorrt": "10.0", "lowered": {"Attention": 1}}, "outputs": {}, "inputs": {}, "options": {}}
    write_manifest(tmp_path, manifest)
    options = EngineOptions(precision="fp16", target="a100", flags=BuildFlags(decode_gemv=True))
    with pytest.raises(EngineError, match=r"was not tried with attention in operators of TensorRT 10\.0"):
        build_engine(step, options, write_part_graphs)
    assert not list(tmp_path.glob("*-engine*.onnx"))


def test_another_split_leaves_the_graphs_of_an_engine_alone(make_stage: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine for a second GPU is cut elsewhere; the first one's plans still need the graphs that they were built from."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")

    def build(*_: object) -> BuildResult:
        raise EngineError("cut, not built")

    monkeypatch.setattr(TensorRTRTX, "build", build)
    step = parts_artifact(make_stage, tmp_path, layers=4)
    kept: dict[str, str] = {}
    for target, parts in (("a100", 2), ("l4", 3), ("a100", 4)):
        with pytest.raises(EngineError, match="cut, not built"):
            build_engine(step, EngineOptions(precision="fp16", target=target, parts=parts), write_part_graphs)
        now = {file.name: sha256_of(file) for file in tmp_path.glob("fused-engine-layers-*.onnx")}
        assert now.items() > kept.items()
        kept = now


def test_engines_of_both_forms_stand_in_one_artifact(make_stage: Make, tmp_path: Path) -> None:
    """Another GPU, other rows: each engine's graph stays the one that it was built from."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    step = artifact_of(make_stage, tmp_path, "fp16")
    options = EngineOptions(precision="fp16", target="a100", max_batch=2)
    first, second = (build_engine(step, one, write_part_graphs)["engines"][0] for one in (options, replace(options, target="a10")))
    assert (first["graph"], second["graph"]) == ("fused-engine-gemv.onnx", "fused-engine.onnx")
    assert [one["graph_sha256"] for one in (first, second)] == [sha256_of(tmp_path / one["graph"]) for one in (first, second)]


def test_a_build_without_mimalloc_says_so(make_stage: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    monkeypatch.setattr(allocator, "mimalloc", lambda: None)
    step = artifact_of(make_stage, tmp_path, "int8")
    (engine,) = build_engine(step, EngineOptions(precision="int8", target="a100", max_batch=2), write_part_graphs)["engines"]
    assert engine["allocator"] == allocator.SYSTEM
    assert engine["notes"] == ["built under the system's allocator, which takes half as long again: pip install cmeel-mimalloc"]
