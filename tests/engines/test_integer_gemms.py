"""The audit's gate on INT8 by INT8, on real plans: there where the graph rounds inputs, in float32, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.progress import silent
from engines.audit import audit_plan
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.graph_weights import find_weights
from engines.profiles import make_profiles
from engines.targets import find_target

SMOOTHQUANT = "int8-smoothquant"
ISLAND = ("DequantizeLinear", "Transpose", "MatMul")
Built = Callable[..., tuple[Any, Path]]


def audit(stage: Any, plan: Path, precision: str = SMOOTHQUANT) -> dict[str, dict[str, Any]]:
    """Name → check."""
    result = audit_plan(plan, stage.engine_graph, precision=precision, profiles=["prefill", "decode"], config=stage.config)
    return {check["check"]: check for check in result["audit"]["checks"]}


def failures(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, check in checks.items() if check["passed"] is False]


def edited(make_stage: Callable[..., Any], folder: Path, edit: Callable[[ir.Graph], None]) -> tuple[Any, Path]:
    """A stage whose graph was changed, and its plan."""
    stage = make_stage(folder, 1, SMOOTHQUANT)
    model = ir.load(stage.path)
    edit(model.graph)
    ir.save(model, stage.path)
    plan = folder / "model.plan"
    profiles = tuple(make_profiles(stage.config, "fp16", max_batch=2, max_length=256))
    TensorRTRTX().build(BuildRequest(stage.engine_graph, plan, find_target("a100"), profiles), silent)
    return stage, plan


def scale_at_run_time(graph: ir.Graph) -> None:
    """The scale of each input from its own largest value: TensorRT multiplies by int8 weights in float instead."""
    by = ir.Value(name="levels", const_value=ir.tensor(np.float32(127), name="levels"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    graph.initializers.add(by)
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        x, old = quantize.inputs[:2]
        largest = ir.node("ReduceMax", [ir.node("Abs", [x], name=f"{quantize.name}.abs").outputs[0]], {"keepdims": 0}, name=f"{quantize.name}.max")
        scale = ir.node("Div", [largest.outputs[0], by], name=f"{quantize.name}.scale")
        before = largest.inputs[0].producer()  # type: ignore[union-attr]
        graph.insert_before(quantize, [before, largest, scale])  # type: ignore[list-item]
        for node in [use.node for use in old.uses()]:  # type: ignore[union-attr]
            node.replace_input_with(1, scale.outputs[0])


def halves(graph: ir.Graph) -> None:
    """Islands typed float16: the GEMM's sums leave it in float16, before they are scaled."""
    for scale in [node.inputs[1] for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        assert scale is not None
        assert scale.const_value is not None
        scale.const_value = ir.tensor(scale.const_value.numpy().astype(np.float16), name=scale.name)
        scale.type = ir.TensorType(ir.DataType.FLOAT16)
    for cast in [node for node in graph if node.op_type == "Cast" and not node.outputs[0].is_graph_output()]:
        reads_island = any(use.node.op_type == "QuantizeLinear" for use in cast.outputs[0].uses())
        makes_half = cast.inputs[0] is not None and (product := cast.inputs[0].producer()) is not None and product.op_type == "MatMul"
        if reads_island or makes_half:
            ir.convenience.replace_all_uses_with(cast.outputs[0], cast.inputs[0], replace_graph_outputs=True)
            graph.remove(cast, safe=True)
    for value in [value for node in graph if node.op_type in ISLAND for value in node.outputs if value.dtype == ir.DataType.FLOAT]:
        value.type = ir.TensorType(ir.DataType.FLOAT16)


def test_weight_only_linears_beside_integer_ones_pass(built: Built) -> None:
    stage, plan = built(2, SMOOTHQUANT, weight_only=("1_down",))
    checks = audit(stage, plan)
    assert failures(checks) == []
    for profile in ("prefill", "decode"):
        assert (checks[f"integer_gemms_{profile}"]["value"], checks[f"quantized_gemms_{profile}"]["value"]) == (7, 8)
    assert [weight.name for weight in find_weights(ir.load(stage.engine_graph).graph) if weight.quantized and not weight.integer] == ["l1_down_int8"]


def test_weight_only_plans_multiply_no_integers(built: Built) -> None:
    checks = audit(*built(2, "int8"), "int8")
    assert {(checks[f"integer_gemms_{profile}"]["value"], checks[f"integer_gemms_{profile}"]["passed"]) for profile in ("prefill", "decode")} == {
        (0, True)
    }


def test_finds_integers_where_the_graph_is_weight_only(built: Built) -> None:
    """The plan of a graph that rounds every input, audited as one that leaves the last linear's alone."""
    stage, _ = built(2, SMOOTHQUANT, weight_only=("1_down",))
    _, plan = built(2, SMOOTHQUANT)
    wrong = audit(stage, plan)["integer_gemms_decode"]
    assert (wrong["value"], wrong["limit"], wrong["passed"], wrong["where"]) == (8, 7, False, "node_l1_down")


def test_finds_integers_that_became_weight_only(make_stage: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    checks = audit(*edited(make_stage, tmp_path, scale_at_run_time))
    wrong = checks["integer_gemms_prefill"]
    assert (wrong["value"], wrong["limit"], wrong["where"]) == (0, 4, "node_l0_down and 3 more")
    assert {"integer_gemms_prefill", "integer_gemms_decode"} <= set(failures(checks))


def test_finds_integer_sums_that_leave_in_float16(make_stage: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    checks = audit(*edited(make_stage, tmp_path, halves))
    assert {"integer_gemms_prefill", "integer_gemms_decode"} <= set(failures(checks))
    assert checks["integer_gemms_decode"]["value"] == 0
