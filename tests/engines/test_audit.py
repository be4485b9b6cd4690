"""engines/audit.py, on real plans: what is right passes, and each thing that is wrong is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.progress import silent
from engines.audit import PLAN_LIMIT, PLAN_TEXT, audit_plan, plan_bytes
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.form_limits import LAYER_TEXT
from engines.kernel_source import read_kernel_sources
from engines.layer_checks import ATTENTION_KERNELS
from engines.plan_sums import float16_sums
from engines.profiles import Profile, make_profiles
from engines.targets import find_target

Built = Callable[..., tuple[Any, Path]]


def audit(stage: Any, plan: Path, precision: str = "fp16") -> dict[str, Any]:
    return audit_plan(plan, stage.engine_graph, precision=precision, profiles=["prefill", "decode"], config=stage.config)


def check(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(check for check in result["audit"]["checks"] if check["check"] == name)
    return found


def failures(result: dict[str, Any]) -> list[str]:
    return [check["check"] for check in result["audit"]["checks"] if check["passed"] is False]


@pytest.mark.parametrize(("precision", "per_weight"), [("fp16", 2.0), ("int8", 1.0), ("int8-smoothquant", 1.0)])
def test_passes_what_the_fusions_make(built: Built, precision: str, per_weight: float) -> None:
    stage, plan = built(2, precision)
    result = audit(stage, plan, precision)
    assert failures(result) == []
    assert result["audit"]["passed"]
    assert result["bytes_per_weight"] == pytest.approx(per_weight, abs=0.02)
    assert (result["kernels"]["_gemv_mha_v1"], result["kernels"]["_gemm_mha_v2"]) == (2, 2)
    assert "_gemv_mha_v1" not in result["kernels_by_profile"]["prefill"]
    gemms = [kernel for group in result["kernels_by_layer"]["decode"]["layers"] for kernel in group["kernels"] if kernel["kind"] == "gemm"]
    assert {kernel["weight"] for kernel in gemms} == {"half" if precision == "fp16" else "int8"}


def test_finds_weights_that_are_stored_twice(built: Built) -> None:
    stage, plan = built(2, "fp16", split_last=True)
    result = audit(stage, plan)
    # found in the bytes, in what the kernels read, and in the plan's table of constants
    assert failures(result) == ["weights_stored_twice", "bytes_per_weight", "constant_bytes_per_weight_byte"]
    assert check(result, "weights_stored_twice")["where"] == "l0_gate_up_weight and 1 more"
    assert result["bytes_per_weight"] > 2.2


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_finds_linears_that_add_up_in_float16(built: Built, precision: str) -> None:
    stage, plan = built(2, precision, half_sums=True)
    result = audit(stage, plan, precision)
    assert failures(result) == ["float16_sums"]
    assert (check(result, "float16_sums")["value"], check(result, "float16_sums")["where"]) == (9, "node_logits")  # 4 a layer, and lm_head


def test_a_plan_that_says_nothing_of_sums_fails(built: Built) -> None:
    stage, plan = built(2)
    assert float16_sums(plan, ["node_l0_qkv"]) == (0, None)
    assert float16_sums(plan, ["node_l0_nowhere"]) == (None, "node_l0_nowhere")
    other = stage.path.with_name("silent.plan")
    other.write_bytes(plan.read_bytes().replace(b"accumulation_type=", b"accumulation_mode="))
    assert failures(audit(stage, other)) == ["float16_sums"]


def test_finds_int8_that_became_float16(built: Built) -> None:
    """A plan that was built from the float16 graph, audited as the int8 engine."""
    stage, _ = built(2, "int8")
    _, plan = built(2, "fp16")
    result = audit(stage, plan, "int8")
    assert check(result, "bytes_per_weight")["value"] > 1.9
    assert {"bytes_per_weight", "weights_missing"} <= set(failures(result))


def test_finds_int8_that_decode_writes_out_first(built: Built, tmp_path: Path) -> None:
    """With one row and one token TensorRT-RTX multiplies by a vector, in a kernel that reads no INT8."""
    stage, _ = built(2, "int8")
    plan = tmp_path / "one-row.plan"
    profiles = tuple(make_profiles(stage.config, "fp16", max_batch=1, max_length=256))
    TensorRTRTX().build(BuildRequest(stage.engine_graph, plan, find_target("a100"), profiles), silent)
    result = audit(stage, plan, "int8")
    written = check(result, "weights_written_out")
    assert written["passed"] is False
    assert written["where"] is not None
    gemms = check(result, "quantized_gemms_decode")  # the other linears are sums of products, which read int8 themselves
    assert (gemms["value"], gemms["limit"], gemms["where"]) == (6, 8, "l0_gate_up_int8 and 1 more")


def test_names_a_weight_that_is_not_in_the_plan(built: Built, tmp_path: Path) -> None:
    stage, plan = built(2)
    graph = ir.load(stage.engine_graph).graph
    bytes_of_weight = graph.initializers["l1_down_weight"].const_value.tobytes()
    content = plan.read_bytes()
    assert content.count(bytes_of_weight) == 1
    other = tmp_path / "other.plan"
    other.write_bytes(content.replace(bytes_of_weight, np.random.default_rng(3).bytes(len(bytes_of_weight))))
    result = audit(stage, other)
    assert failures(result) == ["weights_missing"]
    assert check(result, "weights_missing")["where"] == "l1_down_weight"


def test_finds_a_decode_profile_without_its_attention_kernel(built: Built, tmp_path: Path) -> None:
    stage, _ = built(2)
    prefill, _ = make_profiles(stage.config, "fp16", max_batch=2, max_length=256)
    plan = tmp_path / "two-prefills.plan"
    request = BuildRequest(stage.engine_graph, plan, find_target("a100"), (prefill, Profile("decode", prefill.axes, prefill.shapes)))
    TensorRTRTX().build(request, silent)
    result = audit(stage, plan)
    by_layer = ("kernels", "copies", "copied_caches")
    assert failures(result) == ["fused_attention_decode", *(f"{what}_per_layer_decode" for what in by_layer)]  # what prefill needs beside it
    wrong = check(result, "fused_attention_decode")
    assert (wrong["value"], wrong["limit"], wrong["where"]) == (0, 2, "layer 0: 0 and 1 more")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"attention": "rescaled"}, {"copied_caches_per_layer_decode": 1}),
        ({"attention": "repeated"}, {"repeated_caches_per_layer_prefill": 2, "repeated_caches_per_layer_decode": 2}),
        (
            {"attention": "grouped"},
            {
                "fused_attention_prefill": 0,
                "fused_attention_decode": 0,
                "kernels_per_layer_prefill": 16,
                "kernels_per_layer_decode": 15,
                "copies_per_layer_prefill": 4,
                "copies_per_layer_decode": 3,
                "copied_caches_per_layer_prefill": 3,
                "copied_caches_per_layer_decode": 3,
            },
        ),
        (
            {"bfloat_output": True},  # its weight is stored as bfloat16, and so not found
            {"weights_missing": 2, "casts_per_layer_prefill": 1, "casts_per_layer_decode": 1, "kernels_per_layer_decode": 11, "float16_sums": 2},
        ),
    ],
    ids=["keys are multiplied at each step", "keys are repeated", "attention is products", "a linear in bfloat16"],
)
def test_finds_what_a_layer_should_not_hold(built: Built, form: dict[str, Any], expected: dict[str, int]) -> None:
    result = audit(*built(2, "fp16", **form))
    assert {name: check(result, name)["value"] for name in failures(result)} == expected
    assert all(check(result, name)["where"] for name in expected)


@pytest.mark.parametrize(
    ("form", "wrong"),
    [("repeated", "repeated_caches_per_layer_decode"), ("grouped", "fused_attention_prefill"), ("fused", "fused_attention_decode")],
)
def test_limits_of_lowered_attention_are_no_excuse_for_another_form(built: Built, form: str, wrong: str) -> None:
    stage, plan = built(2, "fp16", attention=form)
    result = audit_plan(plan, stage.engine_graph, precision="fp16", profiles=["prefill", "decode"], config=stage.config, lowered=True)
    assert wrong in failures(result)


def test_finds_logits_of_every_position(built: Built, tmp_path: Path) -> None:
    """A plan of the stage itself, where lm_head reads the whole prompt."""
    stage, _ = built(2)
    plan = tmp_path / "all-positions.plan"
    profiles = tuple(make_profiles(stage.config, "fp16", max_batch=2, max_length=256))
    TensorRTRTX().build(BuildRequest(stage.path, plan, find_target("a100"), profiles), silent)
    result = audit(stage, plan)
    assert failures(result) == ["logits_positions_prefill"]  # in decode there is one position
    assert check(result, "logits_positions_prefill")["value"] > 1


def test_finds_a_quantised_linear_that_no_int8_gemm_computes(built: Built) -> None:
    """The float16 plan, audited as the int8 engine: eight linears, of which none reads int8."""
    stage, _ = built(2, "int8")
    _, plan = built(2, "fp16")
    found = check(audit(stage, plan, "int8"), "quantized_gemms_decode")
    assert (found["value"], found["limit"], found["passed"]) == (0, 8, False)
    assert found["where"] == "l0_down_int8 and 7 more"


def test_says_that_layers_cannot_be_read(built: Built) -> None:
    stage, plan = built(1)
    model = ir.load(stage.engine_graph)
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        node.metadata_props.clear()
    nameless = stage.path.with_name("nameless.onnx")
    ir.save(model, nameless)
    result = audit_plan(plan, nameless, precision="fp16", profiles=["prefill", "decode"], config=stage.config)
    wrong = check(result, "kernels_per_layer_decode")
    assert (wrong["value"], wrong["passed"], wrong["where"]) == (None, False, "no kernel says to which layer it belongs")


def test_float32_is_measured_and_not_gated(built: Built) -> None:
    stage, plan = built(2, "fp16", split_last=True)
    result = audit(stage, plan, "fp32")
    assert check(result, "weights_stored_twice")["value"] == 2
    assert {c["check"] for c in result["audit"]["checks"] if c["passed"] is not None} == {"weights_missing"}
    assert result["audit"]["passed"]


def test_only_attention_is_stored_for_every_layer(built: Built) -> None:
    _, plan = built(3)
    assert {source.kernel: source.copies for source in read_kernel_sources(plan) if source.copies > 1} == dict.fromkeys(ATTENTION_KERNELS.values(), 3)


def test_names_a_kernel_that_is_stored_for_every_layer(built: Built) -> None:
    """Split behind the transposition, prefill makes query, keys and values in one kernel, of which layer 1 and layer 2 have their own text."""
    assert check(audit(*built(3)), "plan_bytes_per_weight_byte")["where"] is None
    where = check(audit(*built(3, all_turned=True)), "plan_bytes_per_weight_byte")["where"]
    assert where.startswith("__myl_TranSlicConc")
    assert where.endswith(" 2 times")


@pytest.mark.parametrize(("layers", "limit"), [(1, PLAN_LIMIT), (2, PLAN_LIMIT), (3, 1.0656), (12, None)])
def test_whole_plan_is_gated_by_the_text_that_such_a_plan_holds(tmp_path: Path, layers: int, limit: float | None) -> None:
    weights = round((PLAN_TEXT + 2 * LAYER_TEXT) / (PLAN_LIMIT - 1)) + 1  # the text of two layers fits
    plan = tmp_path / "part-00.plan"
    for ratio, passed in (((limit or 1) - 0.001, True), ((limit or 1) + 0.001, False)):
        with plan.open("wb") as file:
            file.truncate(round(weights * ratio))
        found = plan_bytes(plan, weights, layers, gated=True)
        assert (found["limit"], found["passed"]) == (limit, passed if limit else None)
        assert plan_bytes(plan, weights, layers, gated=False)["passed"] is None
