"""Stages that are judged on text: perplexity, KL, and int8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
Report = dict[str, Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(str(number * number % 64) for number in range(2200)))
    return path


@pytest.fixture(scope="module")
def report(quantized: Path, text: Path, checkpoint: Checkpoint) -> Report:
    return validate_artifact(StepContext(quantized), checkpoint=checkpoint, stages=None, text=[text], tokens=2048)


def stage_of(report: Report, name: str) -> Report:
    return next(entry for entry in report["stages"] if entry["stage"] == name)


def test_every_stage_is_scored_on_the_text(report: Report) -> None:
    assert report["passed"] is True
    assert report["headline"] == "structure and quality proven"
    assert report["text"]["scored_tokens"] == 2048
    for name in ("traced", "fused", "int8"):
        assert stage_of(report, name)["perplexity"] > 1
        assert stage_of(report, name)["perplexity_se_pct"] > 0


def test_int8_is_further_from_the_reference_than_float16_and_within_its_limits(report: Report) -> None:
    int8, fused = stage_of(report, "int8"), stage_of(report, "fused")
    assert int8["mean_kl"] > 10 * fused["mean_kl"]
    assert int8["noise_ratio"] > 2
    assert {check["check"]: check["passed"] for check in int8["checks"]} == {
        "perplexity_increase_pct": True,
        "mean_kl": True,
        "self_consistency": True,
        "scenario_spread": True,
        "cache_error": True,
        "strict_nonfinite": True,
        "range_peak": True,
    }


def test_perplexity_is_gated_by_the_lower_end_of_its_increase(report: Report) -> None:
    int8 = stage_of(report, "int8")
    check = next(check for check in int8["checks"] if check["check"] == "perplexity_increase_pct")
    assert check["value"] == pytest.approx(int8["perplexity_increase_pct"] - 2 * int8["perplexity_se_pct"])


def test_perplexity_of_few_tokens_is_shown_and_not_judged(quantized: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(quantized, tmp_path / "tiny"))
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=["int8"], text=[text], tokens=300)
    int8 = stage_of(report, "int8")
    check = next(check for check in int8["checks"] if check["check"] == "perplexity_increase_pct")
    assert int8["perplexity_increase_pct"] is not None
    assert check["passed"] is None
    assert check["reason"] == "not judged: too few tokens for the gate (300 of 2,048)"
    assert report["headline"].startswith("structure proven for int8, quality not: too few tokens for the gate (300 of 2,048)")


def damaged_report(artifact: Path, checkpoint: Checkpoint, rewrite: Callable[[ir.Model], None], text: Path, tmp_path: Path) -> Report:
    damaged = Path(shutil.copytree(artifact, tmp_path / "tiny"))
    model = ir.load(damaged / "int8.onnx")
    rewrite(model)
    ir.save(model, damaged / "int8.onnx")
    return validate_artifact(StepContext(damaged), checkpoint=checkpoint, stages=["int8"], text=[text], tokens=300)


def test_int8_fails_when_a_layer_loses_its_scale(quantized: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    def swap_weight_and_scale_of_two_layers(model: ir.Model) -> None:
        nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
        alike = [node for node in nodes if node.inputs[1] is not None and node.inputs[1].shape == nodes[0].inputs[1].shape]  # type: ignore[union-attr]
        first, second = alike[0], alike[-1]
        scales = first.inputs[1], second.inputs[1]
        first.replace_input_with(1, scales[1])
        second.replace_input_with(1, scales[0])

    report = damaged_report(quantized, checkpoint, swap_weight_and_scale_of_two_layers, text, tmp_path)
    stage = stage_of(report, "int8")
    assert stage["passed"] is False
    assert "mean_kl" in {check["check"] for check in stage["checks"] if check["passed"] is False}


def test_int8_fails_when_a_layer_overflows_float16(
    quantized: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path, overflow_around: Callable[..., None]
) -> None:
    module = "model.layers.1.mlp.down_proj"
    report = damaged_report(quantized, checkpoint, lambda model: overflow_around(model, module, 2.0**15), text, tmp_path)
    failed = {check["check"]: str(check["where"]) for check in stage_of(report, "int8")["checks"] if check["passed"] is False}
    assert set(failed) == {"strict_nonfinite", "range_peak"}
    assert module in failed["strict_nonfinite"]
    assert "layers.1.mlp" in failed["range_peak"]


def test_stored_bytes_of_int8_weights_are_verified(quantized: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(quantized, tmp_path / "tiny"))
    entries = json.loads((damaged / "weights/int8-checksums.json").read_text())
    name, entry = next(iter(entries.items()))
    content = bytearray((damaged / entry["file"]).read_bytes())
    content[entry["offset"]] ^= 1
    (damaged / entry["file"]).write_bytes(content)
    report = validate_artifact(StepContext(damaged), checkpoint=checkpoint, stages=["int8"], text=[text], tokens=300)
    assert [(failed["file"], failed["tensor"]) for failed in report["checksums"]["failed"]] == [(entry["file"], name)]
    assert report["passed"] is False


def test_int8_fails_when_positions_shift_in_decode_only(
    quantized: Path, checkpoint: Checkpoint, text: Path, tmp_path: Path, shift_decode_positions: Callable[[ir.Model], None]
) -> None:
    report = damaged_report(quantized, checkpoint, shift_decode_positions, text, tmp_path)
    failed = {check["check"]: check["where"] for check in stage_of(report, "int8")["checks"] if check["passed"] is False}
    assert failed["self_consistency"] in {"decode, steps", "padded, row 0, steps", "padded, row 1, steps"}
