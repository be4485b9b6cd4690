"""quantize within a limit on perplexity: what is kept out and why, what is measured once, and a limit that can't be met."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from math import expm1
from pathlib import Path

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from artifact.errors import ParityMismatch, QuantizationError, UsageError
from artifact.hashing import sha256_of
from artifact.manifest import read_manifest
from artifact.stale import command_of
from artifact.steps import Outcome, run_step
from commands.calibrate import CalibrationOptions
from commands.graphs import fuse, quantize
from commands.placement import PlacementOptions
from commands.summary import summarize
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.quantize.placement import Measured, nats_of
from graphs.quantize.sensitivities import LinearScore, read_scores
from validation import joint_cost
from validation.calibration_text import DEFAULT as CALIBRATION_TEXT
from validation.text import DEFAULT_TEXT

TOKENS = 64


@pytest.fixture(scope="module")
def fused(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported and fused, with a tokenizer that knows the letters; not to be changed."""
    artifact = tmp_path_factory.mktemp("artifacts") / "tiny"
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")))
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    fuse(artifact)
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate("?etaoinshrdlu")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(artifact / "tokenizer.json"))
    return artifact


@pytest.fixture
def artifact(fused: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fused, tmp_path / "tiny"))


def within(artifact: Path, limit_pct: float | None) -> Outcome:
    return quantize(artifact, placement=PlacementOptions(limit_pct, TOKENS))


def scores(artifact: Path) -> list[LinearScore]:
    found, _ = read_scores(artifact, "int8")
    return found


def test_a_limit_that_all_keep_quantises_all(artifact: Path) -> None:
    report = within(artifact, 50).report
    assert report["quantized"] == 8
    assert report["placement"]["chosen"]["share"] == 1
    assert report["placement"]["sha256"] == sha256_of(CALIBRATION_TEXT)
    assert report["placement"]["held_out"]
    assert [tried["quantized"] for tried in report["placement"]["tries"]] == [0, 8]
    assert list(read_manifest(artifact)["steps"]) == ["export", "fuse", "calibrate", "sensitivity-int8", "quantize-int8"]
    chart = json.loads((artifact / "sensitivity-int8.json").read_text())
    assert [linear["kept"] for linear in chart["linears"]] == [False] * 8


def test_what_costs_too_much_is_kept_with_its_number_and_stays_in_float(artifact: Path) -> None:
    within(artifact, 50)
    limit_pct = 100 * expm1(0.4 * sum(score.mean_kl for score in scores(artifact)))
    report = within(artifact, limit_pct).report
    kept = {entry["name"]: entry["reason"] for entry in report["kept"] if ".layers." in entry["name"]}
    assert 0 < len(kept) < 8
    assert report["quantized"] == 8 - len(kept)
    assert report["placement"]["chosen"]["kl"] <= nats_of(limit_pct)
    assert all(reason.startswith("alone it costs ") for reason in kept.values())
    weights = set(ir.load(artifact / "int8.onnx").graph.initializers)
    assert all(f"{name}.weight" in weights and f"{name}.weight_int8_t" not in weights for name in kept)
    chart = json.loads((artifact / "sensitivity-int8.json").read_text())
    assert {linear["name"]: linear["reason"] for linear in chart["linears"] if linear["kept"]} == kept
    cheapest = min(scores(artifact), key=lambda score: score.mean_kl / score.bytes_saved)
    assert cheapest.name not in kept


def test_another_limit_uses_the_same_scores_and_no_limit_takes_them_back(artifact: Path) -> None:
    within(artifact, 50)
    measured = (artifact / "scores-int8.json").stat().st_mtime_ns
    assert within(artifact, 50).up_to_date
    assert not within(artifact, 60).up_to_date
    assert (artifact / "scores-int8.json").stat().st_mtime_ns == measured
    report = quantize(artifact).report
    assert "placement" not in report
    assert not list(artifact.glob("s*-int8.json"))
    assert list(read_manifest(artifact)["steps"]) == ["export", "fuse", "calibrate", "quantize-int8"]


def test_the_command_of_a_step_names_its_limit(artifact: Path) -> None:
    within(artifact, 50)
    options = read_manifest(artifact)["steps"]["quantize-int8"]["options"]
    command = command_of(artifact, "quantize-int8", options)
    assert command == f"python cli.py quantize {artifact} --scheme int8 --max-perplexity-increase 50 --sensitivity-tokens {TOKENS}"
    recorded = read_manifest(artifact)["steps"]["sensitivity-int8"]["options"]
    assert command_of(artifact, "sensitivity-int8", recorded).startswith(f"python cli.py quantize {artifact} --scheme int8")


def test_a_limit_that_can_not_be_met_is_exit_code_3_and_writes_no_graph(
    artifact: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli("quantize", artifact, "--max-perplexity-increase", "0", "--sensitivity-tokens", str(TOKENS), code=3)
    assert "error: int8 can't keep within 0 % of perplexity; the nearest: 1 of 8 linears quantised cost " in done.stderr
    assert "hint: " in done.stderr
    assert not (artifact / "int8.onnx").exists()
    assert not (artifact / "sensitivity-int8.json").exists()


@pytest.mark.parametrize(("increase", "room"), [(1.2, "1.29"), (1.5, "1.51")])  # KL needs 1.28
def test_what_is_kept_may_cost_too_much_already_and_the_hint_leaves_room(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, increase: float, room: str
) -> None:
    monkeypatch.setattr(joint_cost.JointCost, "measure", lambda self, forms: Measured(0.0158, increase, 0.2, 2048))
    words = rf"within 1 % .* 0 of 8 linears quantised cost \+{increase:.2f} ± 0\.20 %, KL 0\.016 on 2,048 tokens of calibration"
    with pytest.raises(ParityMismatch, match=words) as caught:
        within(artifact, 1)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"--max-perplexity-increase {room} ")
    assert not (artifact / "int8.onnx").exists()


def test_the_report_says_what_was_chosen_and_measured(artifact: Path) -> None:
    lines = [sheet.title for sheet in summarize("quantize", within(artifact, 50).report, up_to_date=False)]
    (line,) = (line for line in lines if line.startswith("within 50 %: "))
    assert "100% of the bytes that can be saved" in line
    assert "2 sets measured on 4,180 tokens of calibration.jsonl" in line


def test_without_calibration_there_is_nothing_to_place_by(artifact: Path) -> None:
    with pytest.raises(QuantizationError, match="what quantising costs can't be measured: --calibration none") as caught:
        quantize(artifact, calibration=CalibrationOptions("none"), placement=PlacementOptions(1.0))
    assert caught.value.hint


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_a_limit_is_a_number(limit: float) -> None:
    with pytest.raises(UsageError, match="a limit is a number of per cent") as caught:
        PlacementOptions(limit)
    assert caught.value.hint


@pytest.mark.parametrize(("scheme", "target"), [("int4", "tensorrt"), ("int4", "onnxruntime"), ("int8", "onnxruntime")])
@pytest.mark.parametrize("options", [PlacementOptions(1.0), PlacementOptions(None, TOKENS)])
def test_a_scheme_that_is_not_placed_takes_no_options_of_placement(scheme: str, target: str, options: PlacementOptions, artifact: Path) -> None:
    if target == "onnxruntime":
        fuse(artifact, target=target)
    with pytest.raises(
        UsageError, match=f"{options.given} is not for {scheme} for {target}; it is for int8, int8-smoothquant for tensorrt"
    ) as caught:
        quantize(artifact, scheme=scheme, target=target, placement=options)
    assert caught.value.hint == "leave it out"


def test_tokens_to_score_on_need_a_limit(artifact: Path) -> None:
    with pytest.raises(UsageError, match="--sensitivity-tokens is for scoring linears, which int8 does with a limit") as caught:
        within(artifact, None)
    assert caught.value.hint == "--max-perplexity-increase 1"


def test_scores_are_those_of_the_rounding_that_is_stored(artifact: Path) -> None:
    """A linear's weight error in the scores is the one that quantize reports of it."""
    report = within(artifact, 50).report
    worst = max(scores(artifact), key=lambda score: score.weight_error)
    assert report["method"] == "gptq"
    assert report["weight_error"]["worst"] == worst.name
    assert report["weight_error"]["worst_rms"] == pytest.approx(worst.weight_error, rel=1e-3)


def test_a_set_is_not_measured_on_what_was_calibrated_on(artifact: Path) -> None:
    with pytest.raises(QuantizationError, match=r"default\.txt was calibrated on; a set measured on it would look cheaper than it is") as caught:
        quantize(artifact, calibration=CalibrationOptions(str(DEFAULT_TEXT), 79000), placement=PlacementOptions(50, TOKENS))
    assert caught.value.hint == "a smaller --calibration-tokens leaves some of it, or --calibration FILE with another text"
    assert not (artifact / "calibration.safetensors").exists()
