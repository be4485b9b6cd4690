"""Plans judged by the reference's kept predictions: run by ONNX Runtime in the place of the GPU's runtime, with no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.errors import UsageError
from artifact.steps import StepContext
from commands.against import read_against
from commands.compare import compare
from commands.validate import ValidateOptions
from engines import device as devices
from engines.device import Device
from exporter.checkpoints import Checkpoint
from validation.kept.limits import plan_limits
from validation.kept.save import save_reference
from validation.prepare import prepare_oracle

pytestmark = pytest.mark.parity
Report = dict[str, Any]
STAGE = "engine a100-80gb-fp16"


@pytest.fixture(scope="module")
def kept(checkpoint: Checkpoint, write_number_tokenizer: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions on the scenarios and on 90 tokens of number words."""
    folder = tmp_path_factory.mktemp("kept")
    write_number_tokenizer(folder)
    (folder / "numbers.txt").write_text(" ".join(str(number * number % 64) for number in range(400)))
    oracle = prepare_oracle(StepContext(folder), checkpoint, "fp32", text=[folder / "numbers.txt"], tokens=90)
    save_reference(folder / "reference.safetensors", oracle, checkpoint, 24)
    return folder / "reference.safetensors"


@pytest.fixture
def judge(artifact: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Device | str], Report]:
    """The report of traced.onnx and the plan, as the command makes it on a machine with that device."""

    def run(device: Device | str) -> Report:
        monkeypatch.setattr(devices, "find_device", lambda: device)
        asked = ValidateOptions(stages=("traced",), device="cuda", against=read_against(str(kept)))
        return compare(artifact, asked, out=tmp_path / "reports")

    return run


def stage_of(report: Report) -> Report:
    found: Report = next(entry for entry in report["stages"] if entry["stage"] == STAGE)
    return found


def failing(report: Report) -> dict[str, str | None]:
    return {check["check"]: check["where"] for check in stage_of(report)["checks"] if check["passed"] is False}


def test_a_sound_plan_passes_and_says_what_ran_it(write_plan: Any, judge: Any, runtime: Any, a100: Device) -> None:
    write_plan()
    report = judge(a100)
    stage = stage_of(report)
    assert (report["passed"], stage["passed"], failing(report)) == (True, True, {})
    assert stage["backend"] == "tensorrt-rtx 1.7.1.116, NVIDIA A100-SXM4-80GB"
    assert [check["check"] for check in stage["checks"]] == ["mean_kl", "part_kl", "nonfinite_logits"]
    assert [check["check"] for check in stage["checks"]] == [row["check"] for row in report["tolerances"] if row["stage"] == STAGE]
    assert 0 < stage["mean_kl"] < 1e-4
    assert stage["quality"]["all"]["tokens"] == 90
    assert [scenario["scenario"] for scenario in stage["scenarios"]] == ["prefill", "decode", "chunked", "padded"]
    assert {profile for profile, _ in runtime.ran} == {"prefill", "decode"}
    assert [engine["file"] for engine in report["engines"]] == ["engines/a100-80gb-fp16/part-00.plan"]
    assert report["verdict"].startswith("passed: 2 of 3 stages ran")
    assert runtime.memory.owned == {}


def test_its_divergence_is_that_of_the_graph_it_was_built_from(write_plan: Any, judge: Any, runtime: Any, a100: Device) -> None:
    write_plan()
    report = judge(a100)
    traced = next(entry for entry in report["stages"] if entry["stage"] == "traced")
    assert stage_of(report)["mean_kl"] == pytest.approx(traced["mean_kl"], rel=0.05)
    assert stage_of(report)["perplexity"] == pytest.approx(traced["perplexity"], rel=1e-5)


def test_a_plan_whose_decode_is_wrong_fails(write_plan: Any, judge: Any, shift_decode_positions: Any, runtime: Any, a100: Device) -> None:
    write_plan(shift_decode_positions)
    report = judge(a100)
    assert report["passed"] is False
    assert failing(report).keys() == {"mean_kl", "part_kl"}
    assert report["headline"].startswith(f"{STAGE} does not match: mean_kl")


def test_what_a_plan_was_not_built_for_is_left_out_and_said(write_plan: Any, judge: Any, runtime: Any, a100: Device) -> None:
    write_plan(max_length=80)
    stage, small = stage_of(judge(a100)), "built for 2 rows of 80 positions, too few for"
    assert [scenario["scenario"] for scenario in stage["scenarios"]] == ["padded"]
    assert stage["warnings"] == [f"not run on all scenarios: {small} prefill, decode, chunked", f"not run: {small} the text's windows"]
    assert {check["check"]: check["passed"] for check in stage["checks"]} == {"mean_kl": None, "part_kl": True, "nonfinite_logits": True}


def test_a_plan_that_nothing_fits_is_not_judged_and_says_why(write_plan: Any, judge: Any, runtime: Any, a100: Device) -> None:
    write_plan(max_length=16)
    report = judge(a100)
    assert (report["passed"], stage_of(report)["passed"], runtime.ran) == (None, None, [])
    assert all("too few for prefill" in check["reason"] for check in stage_of(report)["checks"])


@pytest.mark.parametrize("at", ["load", "run"])
def test_a_plan_that_the_runtime_refuses_is_a_stage_that_failed(write_plan: Any, judge: Any, runtime: Any, a100: Device, at: str) -> None:
    write_plan()
    runtime.broken = at
    report = judge(a100)
    assert (report["passed"], stage_of(report)["passed"]) == (False, False)
    assert f"broken at {at}" in report["headline"]


def test_without_a_gpu_the_reason_is_in_the_report(write_plan: Any, judge: Any, runtime: Any) -> None:
    write_plan()
    report = judge("no NVIDIA driver here: libcuda.so.1")
    reason = "no NVIDIA driver here: libcuda.so.1; the plan's ONNX graph was checked instead"
    assert {"stage": STAGE, "reason": reason} in report["not_run"]
    assert ([stage["stage"] for stage in report["stages"]], report["passed"]) == (["traced"], True)


def test_a_lone_graph_has_no_plans(sound_artifact: Path, kept: Path) -> None:
    asked = ValidateOptions(device="cuda", against=read_against(str(kept)))
    with pytest.raises(UsageError, match=r"--device cuda don't go together: .*traced.onnx is one graph"):
        compare(sound_artifact / "traced.onnx", asked)


@pytest.mark.parametrize(
    ("precision", "checks"),
    [
        ("fp16", {"mean_kl", "part_kl"}),
        ("fp32", {"mean_kl", "part_kl"}),
        ("int8", {"perplexity_increase_pct", "mean_kl", "part_kl"}),
        ("int8-smoothquant", {"perplexity_increase_pct", "mean_kl", "part_kl"}),
        ("int4", set()),
    ],
)
def test_every_precision_has_rows_and_int4_is_finite_and_no_more(precision: str, checks: set[str], config: LlamaConfig) -> None:
    assert {row.check for row in plan_limits(precision)} == checks | {"nonfinite_logits"}
