"""Scores of an artifact: measured on what was not calibrated on, written with what each linear saves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from artifact.calibration import CALIBRATION
from artifact.errors import ArtifactError, QuantizationError
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from graphs.quantize.placement import Candidate, Measured, Placement, Try
from graphs.quantize.sensitivities import LinearScore, by_site, describe, linears_of, read_scores, write_sensitivities
from graphs.quantize.statistics import Statistics
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.fake_quant import Form
from validation.reference import Reference
from validation.scoring import choose_sequences, score_artifact
from validation.sensitivity import score_linears

NAMES = [f"model.layers.{layer}.{site}" for layer in range(2) for site in ("self_attn.qkv_proj", "mlp.down_proj")]
PARTS = (("self_attn.q_proj", 0.001, 100), ("self_attn.k_proj", 0.002, 200), ("self_attn.v_proj", 0.003, 300), ("mlp.down_proj", 0.5, 50))
FORMS = {name: Form(activation_scale=0.05) for name in NAMES}


def text(*, rest: int) -> CalibrationText:
    ids = np.random.default_rng(0).integers(0, 64, (2 + rest, 16))
    return CalibrationText((*ids[:2], ids[0, :5]), None, "t.txt", "abc", 1, (ids[1, :3], *ids[2:]))


@pytest.fixture
def step(tmp_path: Path, checkpoint: Checkpoint) -> StepContext:
    """A folder with statistics."""
    step = StepContext(tmp_path)
    write_statistics(step, Reference(checkpoint.config, checkpoint.read), text(rest=3), "fingerprint", CALIBRATION)
    return step


def test_scores_are_of_text_that_was_not_calibrated_on(step: StepContext, checkpoint: Checkpoint) -> None:
    reference, statistics = Reference(checkpoint.config, checkpoint.read), Statistics(step.artifact / "calibration.safetensors")
    report = score_artifact(step, "int8-smoothquant", reference, FORMS, text(rest=3), statistics, tokens=40)
    assert (report["tokens"], report["held_out"], report["linears"]) == (48, True, 4)
    scores, about = read_scores(step.artifact, "int8-smoothquant")
    assert about == {"scheme": "int8-smoothquant", "text": "t.txt", "sha256": "abc", "tokens": 48, "held_out": True}
    expected = score_linears(reference, np.stack(text(rest=3).rest[1:]), FORMS)
    assert {score.name: score.mean_kl for score in scores} == {name: score.kl for name, score in expected.items()}
    assert report["worst"]["mean_kl"] == max(score.mean_kl for score in scores)


def test_scores_say_what_a_linear_saves_and_how_its_input_peaks(step: StepContext, checkpoint: Checkpoint) -> None:
    statistics = Statistics(step.artifact / "calibration.safetensors")
    score_artifact(step, "int8-smoothquant", Reference(checkpoint.config, checkpoint.read), FORMS, text(rest=3), statistics)
    scores, _ = read_scores(step.artifact, "int8-smoothquant")
    packed, down = scores[0], scores[3]
    assert (packed.layer, packed.kind, down.layer, down.kind) == (0, "qkv_proj", 1, "down_proj")
    assert packed.bytes_saved == (32 + 16 + 16) * 32 - 4 * (32 + 16 + 16)  # float16 − int8 − a float32 scale for each row
    assert down.bytes_saved == 32 * 48 - 4 * 32
    absmax = statistics.of(down.name).absmax
    assert down.activation_peak == pytest.approx(float(absmax.max() / np.median(absmax)))


@pytest.mark.parametrize(("rest", "tokens", "rows", "held_out"), [(3, 32, 2, True), (1, 32, 2, False), (0, 32, 2, False), (0, 999, 2, False)])
def test_sequences_are_whole_and_fresh_as_far_as_there_are_any(rest: int, tokens: int, rows: int, held_out: bool) -> None:
    ids, found = choose_sequences(text(rest=rest), tokens)
    assert (ids.shape, found) == ((rows, 16), held_out)


def test_scores_that_are_missing_or_none_are_refused(step: StepContext) -> None:
    with pytest.raises(ArtifactError, match=r"has no scores-int8\.json") as missing:
        read_scores(step.artifact, "int8")
    assert missing.value.hint == f"python cli.py quantize {step.artifact} --scheme int8"
    (step.artifact / "scores-int8.json").write_text('{"linears": [{"name": 1}]}')
    with pytest.raises(QuantizationError, match="can't be read as scores") as caught:
        read_scores(step.artifact, "int8")
    assert caught.value.hint == f"python cli.py quantize {step.artifact} --scheme int8 --force"


def test_the_report_of_a_placement_names_every_linear_and_every_try(step: StepContext, checkpoint: Checkpoint) -> None:
    statistics = Statistics(step.artifact / "calibration.safetensors")
    score_artifact(step, "int8", Reference(checkpoint.config, checkpoint.read), FORMS, text(rest=3), statistics)
    scores, about = read_scores(step.artifact, "int8")
    write_sensitivities(step, "int8", scores, {NAMES[3]: "too dear"}, {"tokens": about["tokens"]})
    content = json.loads((step.artifact / "sensitivity-int8.json").read_text())
    assert [(linear["name"], linear["kept"], linear["reason"]) for linear in content["linears"]] == [
        *((name, False, None) for name in NAMES[:3]),
        (NAMES[3], True, "too dear"),
    ]
    assert scores[0].candidate == Candidate(NAMES[0], scores[0].mean_kl, scores[0].bytes_saved)
    nothing, some = Try(frozenset(), 0.0, Measured(0, 0, 0, 9)), Try(frozenset(NAMES[:2]), 0.004, Measured(0.002, 0.2, 0.1, 9))
    report = describe(Placement(some, (nothing, some)), 0.5, scores)
    share = sum(score.bytes_saved for score in scores[:2]) / sum(score.bytes_saved for score in scores)
    assert report["chosen"] == {
        "quantized": 2, "share": share, "budget": 0.004, "kl": 0.002, "increase_pct": 0.2, "increase_se_pct": 0.1, "tokens": 9, "kl_se": 0.0,
        "holds": True,
    }  # fmt: skip
    assert [tried["quantized"] for tried in report["tries"]] == [0, 2]


def test_fewer_tokens_than_asked_for_are_said(step: StepContext, checkpoint: Checkpoint) -> None:
    reference, statistics = Reference(checkpoint.config, checkpoint.read), Statistics(step.artifact / "calibration.safetensors")
    one = {NAMES[0]: FORMS[NAMES[0]]}
    report = score_artifact(step, "int8-smoothquant", reference, one, text(rest=3), statistics, tokens=1000)
    assert report["shortfall"] == f"1,000 tokens were asked for, t.txt has {report['tokens']} in whole sequences of 16"
    assert read_scores(step.artifact, "int8-smoothquant")[1]["shortfall"] == report["shortfall"]
    assert "shortfall" not in score_artifact(step, "int8-smoothquant", reference, one, text(rest=3), statistics, tokens=40)


def test_linears_of_one_input_are_one_candidate() -> None:
    apart = [LinearScore(f"model.layers.0.{name}", 0, name, cost, 0.0, size, 0.0, None) for name, cost, size in PARTS]
    sites = by_site(apart)
    assert list(sites) == [
        Candidate("model.layers.0.self_attn.qkv_proj", pytest.approx(0.006), 600),  # type: ignore[arg-type]
        Candidate("model.layers.0.mlp.down_proj", 0.5, 50),
    ]
    assert linears_of(sites, ["model.layers.0.self_attn.qkv_proj"]) == {one.name for one in apart[:3]}
