"""Plans as stages of the report: run by ONNX Runtime in the place of the GPU's runtime, so that what is judged is what a plan's kernels would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.progress import silent
from artifact.steps import StepContext
from engines.build import STAGES
from engines.device import Device
from engines.engine_graph import fix_capacity
from engines.one_position import gather_last_position
from engines.plan import Plan
from engines.profiles import make_profiles
from exporter.checkpoints import Checkpoint
from validation import tolerances
from validation.engines import engine_entries, split_engines
from validation.graph_runner import GraphRunner
from validation.parity import validate_artifact
from validation.plan_runner import PlanRunner
from validation.plan_stage import measure_plan
from validation.prepare import prepare_oracle
from validation.scenarios import make_scenarios, split_sequences, tokens_needed

pytestmark = pytest.mark.parity
Report = dict[str, Any]
STAGE = "engine a100-80gb-fp16"


@pytest.fixture
def validate_on(artifact: Path, checkpoint: Checkpoint) -> Callable[[Device | str | None], Report]:
    def run(device: Device | str | None) -> Report:
        return validate_artifact(
            StepContext(artifact), checkpoint=checkpoint, stages=["traced", "traced-engine"], text=None, tokens=None, device=device
        )

    return run


def stage_of(report: Report) -> Report:
    found: Report = next(entry for entry in report["stages"] if entry["stage"] == STAGE)
    return found


def failing(report: Report) -> set[str]:
    return {check["check"] for check in stage_of(report)["checks"] if check["passed"] is False}


def test_runner_gives_what_the_engine_graph_gives(artifact: Path, config: LlamaConfig, write_plan: Any, runtime: Any, a100: Device) -> None:
    plan = Plan(artifact, write_plan(), a100)
    graph = GraphRunner(artifact / "traced-engine.onnx", config, "fp16", one_position=True)
    main, short = split_sequences(config, np.random.default_rng(0).integers(0, config.vocab_size, tokens_needed(config)), None)
    for scenario in make_scenarios(config, main, short):
        for ours, theirs in zip(PlanRunner(plan, config, "fp16").run(scenario), graph.run(scenario), strict=True):
            np.testing.assert_array_equal(ours.positions, theirs.positions)
            np.testing.assert_array_equal(ours.logits, theirs.logits)
            np.testing.assert_array_equal(np.stack([*ours.keys, *ours.values]), np.stack([*theirs.keys, *theirs.values]))
    assert runtime.memory.owned == {}


def test_a_sound_plan_passes_and_says_what_ran_it(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    write_plan()
    report = validate_on(a100)
    stage = stage_of(report)
    assert (report["passed"], stage["passed"], failing(report)) == (True, True, set())
    assert stage["backend"] == "tensorrt-rtx 1.7.1.116, NVIDIA A100-SXM4-80GB"
    assert [check["check"] for check in stage["checks"]] == [row.check for row in tolerances.limits_of("plan")]
    assert 0 < stage["decode_noise_ratio"] < 1.25
    worst = max(stage["scenarios"], key=lambda scenario: scenario["mean_abs"])
    assert stage["noise_ratio"] == pytest.approx(worst["mean_abs"] / report["floor"]["mean_abs"])
    assert stage["mean_abs"] == worst["mean_abs"]
    assert stage["warnings"] == []
    assert [row["check"] for row in report["tolerances"] if row["stage"] == STAGE] == [check["check"] for check in stage["checks"]]
    assert 0 < stage["cache_error"] < 0.02
    assert report["not_run"] == []
    assert report["verdict"] == "passed: 3 of 3 stages ran"
    assert {profile for profile, _ in runtime.ran} == {"prefill", "decode"}
    assert runtime.memory.owned == {}


def test_a_plan_whose_decode_is_wrong_fails(write_plan: Any, validate_on: Any, shift_decode_positions: Any, runtime: Any, a100: Device) -> None:
    write_plan(shift_decode_positions)
    report = validate_on(a100)
    assert report["passed"] is False
    assert "decode_noise_ratio" in failing(report)
    assert next(entry for entry in report["stages"] if entry["stage"] == "traced")["passed"] is True


def test_a_plan_with_another_layers_weights_fails(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    def swap(model: ir.Model) -> None:
        first, second = (model.graph.initializers[f"model.layers.{layer}.self_attn.v_proj.weight"] for layer in (0, 1))
        first.const_value, second.const_value = second.const_value, first.const_value

    write_plan(swap)
    assert {"noise_ratio", "decode_noise_ratio", "cache_error"} <= failing(validate_on(a100))


def test_a_plan_of_one_row_is_judged_without_the_padded_batch(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    write_plan(max_batch=1)
    report = validate_on(a100)
    stage = stage_of(report)
    assert (report["passed"], stage["passed"]) == (True, True)
    assert [scenario["scenario"] for scenario in stage["scenarios"]] == ["prefill", "decode", "chunked"]
    (warning,) = stage["warnings"]
    assert warning.startswith("not run on all scenarios: built for 1 row of ")
    assert warning.endswith(" positions, too few for padded")


def test_a_plan_too_short_for_the_main_sequence_is_judged_on_what_fits(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    write_plan(max_length=80)
    stage = stage_of(validate_on(a100))
    assert [scenario["scenario"] for scenario in stage["scenarios"]] == ["padded"]
    assert (stage["passed"], stage["decode_noise_ratio"]) == (True, None)
    decoded = next(check for check in stage["checks"] if check["check"] == "decode_noise_ratio")
    assert (decoded["passed"], decoded["reason"].startswith("not judged: built for 2 rows of 80 positions, too few for the main")) == (None, True)


def test_a_plan_that_nothing_fits_is_not_judged_and_says_why(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    write_plan(max_length=16)
    report = validate_on(a100)
    stage = stage_of(report)
    assert (report["passed"], stage["passed"], stage["scenarios"], runtime.ran) == (None, None, [], [])
    assert all(check["reason"].startswith("not judged: built for 2 rows of 16 positions, too few for ") for check in stage["checks"])
    assert report["headline"] == f"{STAGE}: measured, not judged"


def test_text_whose_windows_do_not_fit_is_not_scored(
    write_number_tokenizer: Any, write_plan: Any, artifact: Path, checkpoint: Checkpoint, runtime: Any, a100: Device
) -> None:
    write_number_tokenizer(artifact)
    text = artifact.parent / "numbers.txt"
    text.write_text(" ".join(str(number * number % 64) for number in range(400)))
    write_plan(max_length=80)
    chosen: Any = {"checkpoint": checkpoint, "stages": ["traced"], "text": [text], "tokens": 90, "device": a100}
    report = validate_artifact(StepContext(artifact), **chosen)
    stage, small = stage_of(report), "built for 2 rows of 80 positions, too few for the text's windows"
    assert (stage["passed"], stage["perplexity"], stage["mean_kl"]) == (True, None, None)
    assert f"not run: {small}" in stage["warnings"]
    assert report["headline"] == f"structure proven for traced, {STAGE}, quality not: {STAGE}: not judged: {small}; 1 graph not run"


def test_the_slots_of_a_static_plan_are_not_judged_and_say_why(
    static_artifact: Path, checkpoint: Checkpoint, plan_on_cpu: ModuleType, runtime: Any, a100: Device, tmp_path: Path
) -> None:
    artifact, capacity = Path(shutil.copytree(static_artifact, tmp_path / "static")), checkpoint.config.max_position_embeddings
    model = ir.load(artifact / "fused.onnx")
    gather_last_position(model.graph, "fused.onnx")
    fix_capacity(model.graph, capacity)
    ir.save(model, artifact / "fused-engine.onnx")
    profiles = make_profiles(checkpoint.config, "fp16", "static", max_batch=1, max_length=capacity)
    axes = {profile.name: dict(profile.axes) for profile in profiles}
    entry = plan_on_cpu.write_plan(artifact, "fused-engine.onnx", axes, capacity=capacity) | {"folder": "a100-80gb-fp16"}
    stage = measure_plan(prepare_oracle(StepContext(artifact), checkpoint, "fp16", "static", text=None, tokens=None), entry, a100, silent)
    assert (stage["passed"], stage["stray_slots"], stage["cache_capacity"]) == (True, None, capacity)
    check = next(check for check in stage["checks"] if check["check"] == "stray_slots")
    assert (check["passed"], check["reason"].startswith("not judged: a plan's cache can't be filled beforehand")) == (None, True)


@pytest.mark.parametrize("at", ["load", "run"])
def test_a_plan_that_the_runtime_refuses_is_a_stage_that_failed(write_plan: Any, validate_on: Any, runtime: Any, a100: Device, at: str) -> None:
    write_plan()
    runtime.broken = at
    report = validate_on(a100)
    assert (report["passed"], stage_of(report)["passed"]) == (False, False)
    assert any(f"broken at {at}" in str(check) for check in stage_of(report)["checks"])


def test_a_plan_for_another_gpu_is_not_run_and_never_passed(write_plan: Any, validate_on: Any, runtime: Any, a100: Device) -> None:
    write_plan(compute_capability="8.9", target="l4")
    report = validate_on(a100)
    assert [entry["stage"] for entry in report["stages"]] == ["traced", "traced-engine"]
    (other,) = report["not_run"]
    assert (other["stage"], "built for compute capability 8.9 (l4)" in other["reason"]) == (STAGE, True)
    assert report["verdict"] == "passed: 2 of 3 stages ran, 1 not run"
    assert runtime.ran == []


def test_without_a_gpu_the_reason_is_in_the_report(write_plan: Any, validate_on: Any, runtime: Any) -> None:
    write_plan()
    (other,) = validate_on("no NVIDIA driver here: libcuda.so.1")["not_run"]
    assert other == {"stage": STAGE, "reason": "no NVIDIA driver here: libcuda.so.1; the plan's ONNX graph was checked instead"}


def test_a_graph_that_was_not_asked_for_stands_for_no_plan(write_plan: Any, artifact: Path) -> None:
    write_plan()
    _, (other,) = split_engines(artifact, engine_entries(artifact), None, ["traced"])
    assert other["reason"] == "plans run on their GPU alone, with --device cuda; nor was its graph traced-engine.onnx asked for"


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "plan"), ("fp32", "plan-fp32"), ("int8", "plan-int8"), ("int4", "plan-int4")])
def test_every_precision_has_rows_that_judge_its_plan(precision: str, kind: str) -> None:
    assert tolerances.plan_kind(precision) == kind
    assert "cache_error" in {row.check for row in tolerances.limits_of(tolerances.plan_kind(precision))}


def test_a_precision_that_has_no_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="no limits for a plan of precision 'fp8'; there are: fp16, fp32, int8, int8-smoothquant, int4"):
        tolerances.plan_kind("fp8")


def test_a_plan_of_int4_may_fail_and_never_passes() -> None:
    passed = {"passed": True}
    assert tolerances.verdict([passed], "plan-int4") is None
    assert tolerances.verdict([passed, {"passed": False}], "plan-int4") is False


def test_every_precision_that_is_built_has_rows() -> None:
    assert tolerances.PLAN_KINDS.keys() == STAGES.keys()
