"""engines/decode_gemv.py: decode's second form of q·k·v and down, in numbers, in structure and in real plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from artifact.errors import EngineError
from artifact.layout import MODULE_KEY
from artifact.progress import silent
from engines.audit import audit_plan
from engines.backends.flags import DECODE_GEMV, BuildFlags
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt import TensorRT
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.decode_gemv import SUFFIX, check_gemv, products_bytes
from engines.engine_graph import write_engine_graph
from engines.graph_weights import find_weights, weights_bytes
from engines.profiles import SHORTEST_PREFILL, make_profiles
from engines.targets import find_target
from graphs.diff import moved_weights
from tests.engines.test_engine_graph import feeds, run, static_feeds

Make = Callable[..., Any]
CAPACITY = 128
ROUNDED_ONCE = 2**-8
"""A float16 step below 8: logits are below 4."""


def gemv_graph(stage: Any) -> Path:
    path: Path = stage.path.with_name("fused-engine-gemv.onnx")
    write_engine_graph(stage.path, path, capacity=CAPACITY if stage.kv_cache == "static" else None, decode_gemv=True)
    return path


def largest_difference(stage: Any, inputs: dict[str, np.ndarray]) -> float:
    """Of all outputs, from the engine graph in its usual form."""
    pairs = list(zip(run(gemv_graph(stage), inputs), run(stage.engine_graph, inputs), strict=True))
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(float(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()) for ours, theirs in pairs)


@pytest.mark.parametrize(("sequence", "past"), [(5, 0), (3, 4), (SHORTEST_PREFILL, 0)])
def test_prefill_computes_the_same_bits(make_stage: Make, tmp_path: Path, sequence: int, past: int) -> None:
    assert largest_difference(make_stage(tmp_path, 2, "fp16"), feeds(2, sequence=sequence, past=past)) == 0


@pytest.mark.parametrize("past", [0, 6])
def test_a_step_differs_by_the_order_of_its_sums_alone(make_stage: Make, tmp_path: Path, past: int) -> None:
    assert largest_difference(make_stage(tmp_path, 2, "fp16"), feeds(2, sequence=1, past=past)) <= ROUNDED_ONCE


@pytest.mark.parametrize(("sequence", "last", "tolerance"), [(1, [0, 0], ROUNDED_ONCE), (5, [1, 4], 0)])
def test_a_static_cache_has_it_too(make_stage: Make, tmp_path: Path, sequence: int, last: list[int], tolerance: float) -> None:
    inputs = static_feeds(2, starts=[9, 4], sequence=sequence, last=last)
    assert largest_difference(make_stage(tmp_path, 2, "fp16", kv_cache="static"), inputs) <= tolerance


def test_a_step_adds_its_products_and_multiplies_no_matrix(make_stage: Make, tmp_path: Path) -> None:
    """With the weight that the products read at zero, decode's q·k·v and down are zero, and prefill's are not."""
    path = gemv_graph(make_stage(tmp_path, 1, "fp16"))
    model = ir.load(path)
    model.graph.initializers["gemv_least"].const_value = ir.tensor(np.array([np.iinfo(np.int64).max]), name="gemv_least")  # one is 0
    ir.save(model, path)
    names = [value.name for value in model.graph.outputs]
    for sequence, zero in ((1, True), (3, False)):
        outputs = dict(zip(names, run(path, feeds(1, sequence=sequence, past=0)), strict=True))
        assert (not outputs["present.0.value"].any()) is zero


def test_only_two_linears_a_layer_have_a_second_form_and_none_a_second_weight(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 2, "fp16")
    before, after = ir.load(stage.engine_graph), ir.load(gemv_graph(stage))
    sums = [node.name for node in after.graph if node.op_type == "ReduceSum"]
    assert sums == [f"node_l{layer}_{linear}_sum{SUFFIX}" for layer in (0, 1) for linear in ("qkv", "down")]
    assert moved_weights(before.graph, after.graph) == []
    assert 0 < weights_bytes(after.graph) - weights_bytes(before.graph) < 100
    assert [weight.linears for weight in find_weights(after.graph)] == [weight.linears for weight in find_weights(before.graph)]
    onnx.checker.check_model(gemv_graph(stage), full_check=True)


def test_what_is_added_belongs_to_its_linears_module(make_stage: Make, tmp_path: Path) -> None:
    graph = ir.load(gemv_graph(make_stage(tmp_path, 2, "fp16"))).graph
    added = [node for node in graph if str(node.name).endswith(SUFFIX)]
    assert len(added) == 7 * 4
    assert {node.metadata_props[MODULE_KEY] for node in added if "l1_" in str(node.name)} == {"model.layers.1"}


def test_only_the_whole_result_keeps_its_shape(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "fp16")
    model = ir.load(stage.path)
    linear = next(node for node in model.graph if node.name == "node_l0_qkv")
    linear.outputs[0].shape = ir.Shape(["batch_size", "sequence_length", 512])
    ir.save(model, stage.path)
    joined = next(node for node in ir.load(gemv_graph(stage)).graph if node.name == f"node_l0_qkv_concat{SUFFIX}")
    assert joined.outputs[0].shape == ir.Shape(["batch_size", "sequence_length", 512])
    assert joined.outputs[0].dtype == ir.DataType.FLOAT
    assert joined.inputs[1].shape is None  # type: ignore[union-attr]


def test_a_graph_without_packed_float16_weights_is_refused(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage(tmp_path, 1, "int8")
    with pytest.raises(EngineError, match=r"int8\.onnx: --decode-gemv needs query, key and value in one linear by a float16 weight"):
        write_engine_graph(stage.path, tmp_path / "out.onnx", decode_gemv=True)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("linear", ["qkv", "down"])
def test_a_layer_that_would_be_left_out_is_refused(make_stage: Make, tmp_path: Path, linear: str) -> None:
    """Another node between the weight and its product hides it."""
    stage = make_stage(tmp_path, 2, "fp16")
    model = ir.load(stage.path)
    product = next(node for node in model.graph if node.name == f"node_l1_{linear}")
    between = ir.node("Identity", [product.inputs[1]], name="between")
    between.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.insert_before(product, [between])
    product.replace_input_with(1, between.outputs[0])
    ir.save(model, stage.path)
    with pytest.raises(EngineError, match="in each of 2 layers, found 1"):
        gemv_graph(stage)


@pytest.mark.parametrize(
    ("precision", "parts", "packed", "words"),
    [
        ("int8", None, True, "not int8: the kernel of a sum"),
        ("fp32", 1, True, "not fp32: nothing is fused"),
        ("fp16", 2, True, "got --parts 2"),
        ("fp16", 1, False, "--weights reference leaves them apart"),
    ],
)
def test_what_it_is_not_for_is_refused(precision: str, parts: int | None, packed: bool, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_gemv(precision, parts, packed=packed)


def test_an_fp16_engine_in_one_plan_may_have_it() -> None:
    for parts in (None, 1):
        check_gemv("fp16", parts, packed=True)


def test_a_cpu_holds_the_products_of_the_larger_linear(make_stage: Make, tmp_path: Path) -> None:
    config = make_stage(tmp_path, 1, "fp16").config
    assert products_bytes(config) == (2 * 4 + 4 + 2) * 512 * 256  # q·k·v; down has 384 · 256
    assert products_bytes(replace(config, intermediate_size=1024)) == (2 * 4 + 4 + 2) * 1024 * 256


def test_it_is_tensorrt_rtx_s_alone() -> None:
    flags = BuildFlags(decode_gemv=True)
    assert (TensorRTRTX().lacks(flags), TensorRT().lacks(flags), TensorRT().lacks(BuildFlags())) == ([], [DECODE_GEMV], [])
    assert flags.recorded() == {"decode_gemv": True}


@pytest.fixture(scope="module", params=["dynamic", "static"])
def gemv_plan(request: pytest.FixtureRequest, make_stage: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A stage, its graph with the second form, and the real plan."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    stage = make_stage(tmp_path_factory.mktemp("gemv"), 3, "fp16", kv_cache=request.param)
    return stage, gemv_graph(stage), build(stage, gemv_graph(stage))


def build(stage: Any, graph: Path) -> Path:
    length = CAPACITY if stage.kv_cache == "static" else 256
    profiles = make_profiles(stage.config, "fp16", stage.kv_cache, max_batch=2, max_length=length, gemv=True)
    plan = graph.with_suffix(".plan")
    TensorRTRTX().build(BuildRequest(graph, plan, find_target("a100"), tuple(profiles)), silent)
    return plan


def audit(stage: Any, plan: Path, graph: Path) -> dict[str, Any]:
    return audit_plan(plan, graph, precision="fp16", profiles=["prefill", "decode"], config=stage.config)


def failures(result: dict[str, Any]) -> dict[str, Any]:
    return {check["check"]: check["value"] for check in result["audit"]["checks"] if check["passed"] is False}


def test_decode_runs_eight_kernels_a_layer(gemv_plan: tuple[Any, Path, Path]) -> None:
    stage, graph, plan = gemv_plan
    result = audit(stage, plan, graph)
    assert failures(result) == {}
    layers = result["kernels_by_layer"]["decode"]["layers"]
    assert (layers[0]["first"], layers[-1]["last"]) == (0, 2)
    for group in layers:
        assert [kernel["kind"] for kernel in group["kernels"]] == ["norm", "gemm", "cache", "attention", "gemm", "norm", "gemm", "gemm"]
        assert {kernel["weight"] for kernel in group["kernels"] if kernel["kind"] == "gemm"} == {"half"}
    assert result["bytes_per_weight"] == pytest.approx(2.0, abs=0.02)


def test_prefill_runs_what_it_runs_without(gemv_plan: tuple[Any, Path, Path]) -> None:
    stage, graph, plan = gemv_plan
    usual = stage.path.with_name("fused-engine.onnx")
    without = audit(stage, build(stage, stage.engine_graph), usual)
    assert audit(stage, plan, graph)["kernels_by_profile"]["prefill"] == without["kernels_by_profile"]["prefill"]


def test_a_plan_whose_decode_is_as_usual_fails_its_limits(gemv_plan: tuple[Any, Path, Path]) -> None:
    stage, graph, _ = gemv_plan
    result = audit(stage, build(stage, stage.engine_graph), graph)
    assert failures(result)["kernels_per_layer_decode"] == (9 if stage.kv_cache == "static" else 10)


def without_factor(graph: ir.Graph, node: ir.Node) -> None:
    if str(node.name).endswith(f"_weight{SUFFIX}"):
        node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
        graph.remove(node, safe=True)


def in_float16(graph: ir.Graph, node: ir.Node) -> None:
    """q·k·v multiplies and adds up in float16, and is cast behind it."""
    kind = str(node.name).removesuffix(SUFFIX).partition("qkv_")[2]
    before = {"unsqueeze": ir.DataType.FLOAT16, "concat": ir.DataType.FLOAT}.get(kind)
    if before is not None:
        cast = ir.node("Cast", [node.inputs[0]], {"to": int(before)}, name=f"{node.name}.cast")
        graph.insert_before(node, [cast])
        node.replace_input_with(0, cast.outputs[0])
    if kind == "cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    if kind in ("unsqueeze", "cast", "mul", "sum"):
        node.outputs[0].dtype = ir.DataType.FLOAT16


def failures_after(stage: Any, edit: Callable[[ir.Graph, ir.Node], None]) -> dict[str, Any]:
    """What the audit finds in the plan of a graph whose every node was edited."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    graph = gemv_graph(stage)
    model = ir.load(graph)
    for node in list(model.graph):
        edit(model.graph, node)
    ir.save(model, graph)
    return failures(audit(stage, build(stage, graph), graph))


def test_a_weight_that_is_folded_to_float32_is_found(make_stage: Make, tmp_path: Path) -> None:
    """Without the factor that only a run knows, the compiler stores the cast of each weight beside it."""
    assert failures_after(make_stage(tmp_path, 1, "fp16"), without_factor)["constant_bytes_per_weight_byte"] > 1.5


def test_sums_in_float16_are_found(make_stage: Make, tmp_path: Path) -> None:
    """No GEMM's line says it of them, and prefill's would hide it; a CPU adds up in float32 whatever the graph says."""
    assert failures_after(make_stage(tmp_path, 1, "fp16"), in_float16) == {"float32_sums_decode": 1}


def test_with_one_new_token_in_prefill_nothing_can_be_dropped(make_stage: Make, tmp_path: Path) -> None:
    """Why prefill begins at two: both forms stay, and the audit says so."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    stage = make_stage(tmp_path, 1, "fp16")
    graph, plan = gemv_graph(stage), tmp_path / "from-one.plan"
    profiles = make_profiles(stage.config, "fp16", max_batch=2, max_length=256)
    TensorRTRTX().build(BuildRequest(graph, plan, find_target("a100"), tuple(profiles)), silent)
    assert failures(audit(stage, plan, graph))["kernels_per_layer_prefill"] > 11
