"""Saboteurs: the undamaged artifact passes, the damaged one fails, and the report says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.errors import UsageError, ValidationError
from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint
from exporter.export import export_checkpoint
from exporter.model import RMSNorm
from validation.finite import without_nonfinite
from validation.parity import headline, overall, validate_artifact, verdict
from validation.stage_choice import choose_stages

pytestmark = pytest.mark.parity
Report = dict[str, Any]
Rewrite = Callable[..., None]


def drop_mask(model: ir.Model) -> None:
    mask = next(node for node in model.graph if node.op_type == "Or").outputs[0]
    users = list(mask.uses())
    inverse = ir.Node("", "Not", [mask])
    all_true = ir.Node("", "Or", [mask, inverse.outputs[0]])
    for node, index in users:
        node.replace_input_with(index, all_true.outputs[0])
    model.graph.extend([inverse, all_true])
    model.graph.sort()


def swap_names(values: list[ir.Value], first: str, second: str) -> None:
    by_name = {value.name: value for value in values}
    by_name[first].name, by_name[second].name = "swapped", first
    by_name[first].name = second


def swap_presents(model: ir.Model) -> None:
    for kind in io_spec.CACHE_KINDS:
        swap_names(list(model.graph.outputs), io_spec.present_name(0, kind), io_spec.present_name(1, kind))


def swap_whole_caches(model: ir.Model) -> None:
    """Consistent, so that no logit ever changes: only the caches themselves can tell."""
    swap_presents(model)
    for kind in io_spec.CACHE_KINDS:
        swap_names(list(model.graph.inputs), io_spec.past_name(0, kind), io_spec.past_name(1, kind))


def failing(report: Report, stage: str = "traced") -> dict[str, str | None]:
    entry = next(entry for entry in report["stages"] if entry["stage"] == stage)
    return {check["check"]: check["where"] for check in entry["checks"] if check["passed"] is False}


def scenario_errors(report: Report) -> dict[str, float]:
    return {entry["scenario"]: entry["mean_abs"] for entry in report["stages"][0]["scenarios"]}


def test_validate_passes_an_undamaged_artifact(sound_artifact: Path, sound_report: Report) -> None:
    assert sound_report["passed"] is True
    assert failing(sound_report) == {}
    assert sound_report["verdict"] == "passed: 1 of 1 stages ran"
    assert sound_report["headline"] == "structure proven, quality not: random token ids, because there is no tokenizer"
    assert sound_report["checksums"]["passed"]
    assert sound_report["checksums"]["verified"] > 20
    assert json.loads((sound_artifact / "reports/parity.json").read_text()) == sound_report
    assert {path.suffix for path in (sound_artifact / "reports").glob("parity.*")} == {".json", ".md", ".html", ".xml"}


def test_validate_measures_every_number_of_a_float16_stage(sound_report: Report) -> None:
    stage = sound_report["stages"][0]
    text_only = {"perplexity", "perplexity_increase_pct", "perplexity_se_pct", "p99_kl", "top5_agreement", "quality"}
    static_only, plans_only = {"stray_slots", "cache_capacity"}, {"decode_noise_ratio"}
    assert {key for key, value in stage.items() if value is None} == text_only | static_only | plans_only | {"joined_cuts", "first_layer_outside"}
    assert sound_report["cache"] == {"form": "dynamic", "capacity": None}
    assert [entry["scenario"] for entry in stage["scenarios"]] == ["prefill", "decode", "chunked", "padded"]
    assert len(stage["decode_errors"]) == 96 - 48
    assert {check["check"] for check in stage["checks"]} == {row["check"] for row in sound_report["tolerances"]}


def test_validate_fails_when_the_mask_is_dropped(artifact: Path, validate: Callable[[Path], Report], rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, drop_mask)
    report = validate(artifact)
    assert report["passed"] is False
    assert report["checksums"]["passed"]
    assert "noise_ratio" in failing(report)
    assert report["headline"].startswith("traced does not match")


def test_validate_fails_when_positions_shift_in_decode_only(
    artifact: Path,
    sound_report: Report,
    validate: Callable[[Path], Report],
    rewrite_graph: Rewrite,
    shift_decode_positions: Callable[[ir.Model], None],
) -> None:
    rewrite_graph(artifact, shift_decode_positions)
    report = validate(artifact)
    assert report["passed"] is False
    assert failing(report)["noise_ratio"] in {"decode", "padded"}
    sound, damaged = scenario_errors(sound_report), scenario_errors(report)
    assert {name for name in sound if damaged[name] > 2 * sound[name]} == {"decode", "padded"}


@pytest.mark.parametrize(("swap", "check"), [(swap_presents, "noise_ratio"), (swap_whole_caches, "cache_error")])
def test_validate_fails_when_two_layers_caches_are_swapped(
    swap: Callable[[ir.Model], None], check: str, artifact: Path, validate: Callable[[Path], Report], rewrite_graph: Rewrite
) -> None:
    rewrite_graph(artifact, swap)
    report = validate(artifact)
    assert report["passed"] is False
    assert check in failing(report)
    assert "layer" in str(failing(report)["cache_error"])


def test_swapped_caches_change_no_logit_when_swapped_consistently(artifact: Path, validate: Callable[[Path], Report], rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, swap_whole_caches)
    assert set(failing(validate(artifact))) == {"cache_error"}


def test_validate_names_the_tensor_with_a_changed_byte_and_still_measures(artifact: Path, validate: Callable[[Path], Report]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    entry = json.loads((artifact / "weights/checksums.json").read_text())[name]
    with (artifact / entry["file"]).open("r+b") as file:
        file.seek(entry["offset"] + 6)
        byte = file.read(1)
        file.seek(entry["offset"] + 6)
        file.write(bytes([byte[0] ^ 1]))  # the lowest bit of one weight: far below float16's noise
    report = validate(artifact)
    assert report["passed"] is False
    assert [(failed["file"], failed["tensor"]) for failed in report["checksums"]["failed"]] == [(entry["file"], name)]
    assert name in report["headline"]
    assert report["stages"][0]["passed"] is True


def test_validate_fails_when_the_reference_and_the_export_are_wrong_alike(
    checkpoint: Checkpoint, validate: Callable[[Path], Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: right(norm, x) * 1.5)
    run_step(tmp_path / "a", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    report = validate(tmp_path / "a")
    assert report["floor"]["check"]["passed"] is False
    assert report["floor"]["mean_kl"] > 1e-3
    assert report["passed"] is False
    assert report["headline"].startswith("the reference is not the model that transformers computes: reference_kl")
    assert "reference kl" in (tmp_path / "a/reports/parity.xml").read_text().lower().replace("_", " ")


def test_validate_judges_the_reference_by_transformers(sound_report: Report) -> None:
    assert 0 < sound_report["floor"]["mean_kl"] < 1e-5
    assert sound_report["floor"]["check"]["passed"] is True
    assert sound_report["floor"]["check"]["value"] == sound_report["floor"]["mean_kl"]


def test_validate_reports_a_graph_that_cannot_be_loaded_and_measures_the_others(
    artifact: Path, validate: Callable[[Path], Report], rewrite_graph: Rewrite
) -> None:
    def rename_input(model: ir.Model) -> None:
        model.graph.inputs[2].name = "positions"

    rewrite_graph(artifact, rename_input, to="fused.onnx")
    report = validate(artifact)
    assert {stage["stage"]: stage["passed"] for stage in report["stages"]} == {"traced": True, "fused": False}
    assert "no input position_ids" in report["headline"]


def test_validate_judges_an_fp32_artifact_by_its_largest_error(checkpoint: Checkpoint, tmp_path: Path, rewrite_graph: Rewrite) -> None:
    run_step(tmp_path / "a", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    arguments: dict[str, Any] = {"checkpoint": checkpoint, "stages": ["traced"], "text": None, "tokens": None}
    report = validate_artifact(StepContext(tmp_path / "a"), **arguments)
    assert report["passed"] is True
    assert 0 < report["stages"][0]["max_abs_relative"] < 1e-5
    assert report["floor"]["mean_abs"] is None
    assert "fp32" in report["floor"]["reason"]
    rewrite_graph(tmp_path / "a", drop_mask)
    report = validate_artifact(StepContext(tmp_path / "a"), **arguments)
    assert report["passed"] is False
    assert "max_abs_relative" in failing(report)


def test_choose_stages_puts_each_stage_before_its_engine_graph(tmp_path: Path) -> None:
    for name in ("int8-engine", "int8", "fused-engine", "traced", "fused", "int4-engine", "mine"):
        (tmp_path / f"{name}.onnx").touch()
    chosen, left_out = choose_stages(tmp_path, None, "fp16")
    assert chosen == ["traced", "fused", "fused-engine", "int8", "int8-engine"]
    assert [entry["stage"] for entry in left_out] == ["int4-engine", "mine"]


def test_a_graph_that_was_not_asked_for_is_not_run(checkpoint: Checkpoint, artifact: Path, rewrite_graph: Rewrite) -> None:
    for name in ("fused.onnx", "fused-engine.onnx"):
        rewrite_graph(artifact, lambda model: None, to=name)
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=["traced"], text=None, tokens=None)
    assert report["not_run"] == [{"stage": stage, "reason": "not asked for"} for stage in ("fused", "fused-engine")]
    assert report["verdict"] == "passed: 1 of 3 stages ran, 2 not run"
    assert report["headline"].startswith("structure proven for traced, quality not: ")
    assert report["headline"].endswith("; 2 graphs not run")


def test_choose_stages_refuses_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "traced.onnx").touch()
    with pytest.raises(ValidationError, match=r"has no fused\.onnx") as caught:
        choose_stages(tmp_path, ["fused"], "fp16")
    assert "cli.py fuse" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'nonsense' is not a stage; stages: traced, fused"):
        choose_stages(tmp_path, ["nonsense"], "fp16")


def report_of(*outcomes: bool | None, checksums: bool = True, audit: bool | None = None) -> Report:
    stages = [{"stage": f"stage{index}", "passed": passed, "checks": []} for index, passed in enumerate(outcomes)]
    failed = [] if checksums else [{"file": "weights/a", "tensor": "t", "expected": "1", "got": "2"}]
    return {
        "stages": stages,
        "engines": [{"file": "part-00.plan", "audit": {"passed": audit}}],
        "checksums": {"passed": checksums, "failed": failed},
        "not_run": [{"stage": "engine", "reason": "no GPU"}],
        "text": {"kind": "text", "scored_tokens": 2048},
        "texts": [{"kind": "text", "scored_tokens": 1024}] * 2,
        "floor": {"check": {"check": "reference_kl", "passed": None}},
    }


@pytest.mark.parametrize(
    ("report", "passed"),
    [
        (report_of(True, True), True),
        (report_of(True, False), False),
        (report_of(True, None), None),
        (report_of(True, checksums=False), False),
        (report_of(True, audit=False), False),
        (report_of(), None),
    ],
)
def test_overall_never_passes_what_failed_or_was_not_judged(report: Report, passed: bool | None) -> None:
    assert overall(report) is passed


def test_verdict_counts_stages_that_ran() -> None:
    report = report_of(True, False)
    assert verdict(report | {"passed": overall(report)}) == "failed: 2 of 3 stages ran, 1 failed, 1 not run"


def test_headline_says_what_was_proven_or_what_was_not() -> None:
    assert headline(report_of(True), random_weights=False) == "structure and quality proven"
    assert headline(report_of(True), random_weights=True) == "structure proven, quality not: random weights"
    few = report_of(True) | {"texts": [{"kind": "text", "scored_tokens": 2047}]}
    assert headline(few, random_weights=False) == "structure proven, quality not: too few tokens for the gate (2,047 of 2,048)"
    assert headline(report_of(True, audit=False), random_weights=False) == "the audit of part-00.plan failed"
    assert headline(report_of(True, checksums=False), random_weights=False) == "stored bytes are not those that were written: t in weights/a"


def test_headline_speaks_of_what_was_judged_where_graphs_were_left_out() -> None:
    assert headline(report_of(True), random_weights=False, left_out=1) == "structure and quality proven for stage0; 1 graph not run"
    few = headline(report_of(True, True), random_weights=True, left_out=3)
    assert few == "structure proven for stage0, stage1, quality not: random weights; 3 graphs not run"


def test_headline_says_how_a_stale_step_is_redone() -> None:
    stale = {"file": "fused.onnx", "tensor": None, "expected": "1", "got": "2", "step": "quantize-int8", "hint": "python cli.py quantize A"}
    report = report_of(True) | {"checksums": {"passed": False, "failed": [stale]}}
    words = "quantize-int8 is stale, it was made from another fused.onnx; do it again: python cli.py quantize A"
    assert headline(report, random_weights=False) == words


def test_without_nonfinite_leaves_null_in_their_place() -> None:
    assert without_nonfinite({"a": [1.5, float("nan")], "b": (float("inf"), "x"), "c": 2}) == {"a": [1.5, None], "b": [None, "x"], "c": 2}
