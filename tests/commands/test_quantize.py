"""quantize and what it calibrates on: measured once, up to date while nothing changes, never silently left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from artifact.errors import ArtifactError, QuantizationError
from artifact.manifest import fingerprint, read_manifest, write_manifest
from artifact.progress import silent
from artifact.stale import command_of, stale_steps
from artifact.steps import Outcome, run_step
from artifact.unread import spend_step
from commands import run as run_module
from commands.calibrate import CalibrationOptions, calibrate
from commands.graphs import fuse, quantize
from commands.placement import PlacementOptions
from commands.run import _delete_calibrations
from commands.summary import summarize
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint

FILE, STATIC_FILE = "calibration.safetensors", "calibration-int8-smoothquant.safetensors"
ENOUGH = CalibrationOptions(calibration_tokens=8192)
"""Of the committed text, of which this tokenizer makes fewer tokens than others."""


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<unk>", "the", "of", "and", "to"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def fused(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported and fused, without a tokenizer; not to be changed."""
    artifact = tmp_path_factory.mktemp("artifacts") / "tiny"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, open_checkpoint(str(tiny_checkpoint)), dtype="fp16"))
    fuse(artifact)
    return artifact


@pytest.fixture
def artifact(fused: Path, tmp_path: Path) -> Path:
    """A copy with a tokenizer."""
    copy = Path(shutil.copytree(fused, tmp_path / "tiny"))
    write_tokenizer(copy)
    return copy


def steps(artifact: Path) -> list[str]:
    return list(read_manifest(artifact)["steps"])


def calibration(outcome: Outcome) -> dict[str, object]:
    found: dict[str, object] = outcome.report["calibration"]
    return found


def test_int8_is_calibrated_on_the_committed_text_and_both_steps_are_recorded(artifact: Path) -> None:
    outcome = quantize(artifact)
    assert calibration(outcome)["text"] == "calibration.jsonl"
    assert calibration(outcome)["tokens"] == 8192
    assert steps(artifact) == ["export", "fuse", "calibrate", "quantize-int8"]
    recorded = read_manifest(artifact)["steps"]
    assert recorded["quantize-int8"]["inputs"][FILE] == recorded["calibrate"]["outputs"][FILE]["sha256"]
    assert recorded["calibrate"]["report"]["bytes"] == (artifact / FILE).stat().st_size
    assert quantize(artifact).up_to_date


def test_another_text_or_another_size_is_measured_anew(artifact: Path, tmp_path: Path) -> None:
    quantize(artifact)
    before = (artifact / FILE).read_bytes()
    (tmp_path / "t.txt").write_text("the of and to " * 200)
    options = CalibrationOptions(str(tmp_path / "t.txt"), calibration_tokens=128, calibration_length=32)
    outcome = quantize(artifact, calibration=options)
    assert (calibration(outcome)["text"], calibration(outcome)["sequences"]) == ("t.txt", 4)
    assert (artifact / FILE).read_bytes() != before
    assert quantize(artifact, calibration=options).up_to_date
    (tmp_path / "t.txt").write_text("to and of the " * 200)
    assert not quantize(artifact, calibration=options).up_to_date


def test_none_rounds_plainly_says_so_and_leaves_no_statistics(artifact: Path) -> None:
    quantize(artifact)
    outcome = quantize(artifact, calibration=CalibrationOptions("none"))
    assert calibration(outcome) == {"text": None, "reason": "--calibration none"}
    assert steps(artifact) == ["export", "fuse", "quantize-int8"]
    assert not (artifact / FILE).exists()
    lines = [sheet.title for sheet in summarize("quantize", outcome.report, up_to_date=False)]
    assert "plain rounding, not calibrated: --calibration none" in lines


def test_a_person_reads_what_was_calibrated_on_and_what_the_file_takes(artifact: Path) -> None:
    lines = [sheet.title for sheet in summarize("quantize", quantize(artifact).report, up_to_date=False)]
    assert any(line.startswith("calibrated on calibration.jsonl: ") and FILE in line for line in lines)


def remove_tokenizer(artifact: Path) -> None:
    (artifact / "tokenizer.json").unlink()


def make_random(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    manifest["model"]["format"] = "random"
    write_manifest(artifact, manifest)


@pytest.mark.parametrize(
    ("change", "reason"), [(remove_tokenizer, "the artifact has no tokenizer.json"), (make_random, "random weights")], ids=["no tokenizer", "random"]
)
def test_where_nothing_can_be_measured_rounding_is_plain_and_says_why(change: Callable[[Path], None], reason: str, artifact: Path) -> None:
    change(artifact)
    assert calibration(quantize(artifact)) == {"text": None, "reason": reason}
    assert quantize(artifact).up_to_date
    with pytest.raises(QuantizationError, match=f"can't be calibrated on t.txt: {reason}") as caught:
        quantize(artifact, calibration=CalibrationOptions("t.txt"))
    assert caught.value.hint


def test_a_text_that_is_not_there_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"t\.txt is not a file") as caught:
        quantize(artifact, calibration=CalibrationOptions(str(tmp_path / "t.txt")))
    assert caught.value.hint
    assert "calibrate" not in steps(artifact)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_schemes_of_onnx_runtime_are_calibrated_too(artifact: Path, scheme: str) -> None:
    fuse(artifact, target="onnxruntime")
    outcome = quantize(artifact, scheme=scheme, target="onnxruntime", calibration=CalibrationOptions(calibration_tokens=128))
    assert calibration(outcome)["text"] == "calibration.jsonl"
    assert outcome.report["method"] == "gptq"
    by_name = {entry["name"]: entry for entry in outcome.report["rounded"]}
    assert "output_rms" not in by_name["lm_head"]
    measured = [entry for entry in by_name.values() if "output_rms" in entry]
    assert len(measured) == outcome.report["quantized"] - 1
    assert sum(entry["output_rms"] for entry in measured) < sum(entry["plain_output_rms"] for entry in measured)


def test_int4_names_the_linear_that_no_block_divides(artifact: Path) -> None:
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.mlp\.down_proj: rows of 48 weights can't be cut"):
        quantize(artifact, scheme="int4")
    assert not (artifact / "int4.onnx").exists()


def test_nothing_is_measured_before_there_is_a_graph_to_quantise(artifact: Path) -> None:
    (artifact / "fused.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"has no fused\.onnx"):
        quantize(artifact)
    assert not (artifact / FILE).exists()


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-smoothquant"])
def test_a_graph_that_is_quantised_already_is_refused_before_anything_is_measured(scheme: str, artifact: Path) -> None:
    fused = artifact / "fused.onnx"
    model = ir.load(fused)
    value = ir.Value(name="levels", const_value=ir.tensor(np.zeros(2, np.int8), name="levels"))
    model.graph.initializers.add(value)
    model.graph.insert_before(model.graph[0], ir.node("DequantizeLinear", [value, value]))
    ir.save(model, fused)
    manifest = read_manifest(artifact)
    manifest["steps"]["fuse"]["outputs"]["fused.onnx"] = fingerprint(fused)
    write_manifest(artifact, manifest)
    with pytest.raises(QuantizationError, match=r"fused\.onnx is quantised already"):
        quantize(artifact, scheme=scheme)
    assert "calibrate" not in steps(artifact)


def test_calibration_is_not_done_anew_where_another_scheme_has_just_done_it(artifact: Path) -> None:
    few = CalibrationOptions(calibration_tokens=300)
    quantize(artifact, calibration=few)
    before = read_manifest(artifact)["steps"]["calibrate"]
    assert not quantize(artifact, calibration=few, force=True, recalibrate=False).up_to_date
    assert read_manifest(artifact)["steps"]["calibrate"] == before
    quantize(artifact, calibration=few, force=True)
    assert read_manifest(artifact)["steps"]["calibrate"] != before


def test_statistics_of_other_weights_are_stale_and_quantize_makes_them_anew(artifact: Path) -> None:
    quantize(artifact)
    manifest = read_manifest(artifact)
    manifest["steps"]["export"]["outputs"]["weights/checksums.json"]["sha256"] = "other"
    stale = stale_steps(artifact, manifest)
    assert stale["calibrate"].command == f"python cli.py quantize {artifact}"


def test_statistics_that_were_deleted_are_measured_again_only_for_what_needs_them(artifact: Path) -> None:
    few = CalibrationOptions(calibration_tokens=300)
    quantize(artifact, calibration=few)
    size = (artifact / FILE).stat().st_size
    assert spend_step(artifact, "calibrate") == {FILE: size}
    assert spend_step(artifact, "calibrate") == {}
    assert not (artifact / FILE).exists()
    assert quantize(artifact, calibration=few).up_to_date
    assert not stale_steps(artifact, read_manifest(artifact))
    assert not (artifact / FILE).exists()
    before = read_manifest(artifact)["steps"]["quantize-int8"]["inputs"][FILE]
    limit = PlacementOptions(max_perplexity_increase=50, sensitivity_tokens=64)
    assert not quantize(artifact, calibration=few, placement=limit).up_to_date  # needs them
    assert (artifact / FILE).stat().st_size == size
    assert read_manifest(artifact)["steps"]["quantize-int8"]["inputs"][FILE] == before  # the same statistics
    spend_step(artifact, "calibrate")
    assert quantize(artifact, calibration=few, placement=limit).up_to_date
    assert not (artifact / FILE).exists()
    assert not quantize(artifact, calibration=few, force=True).up_to_date
    assert (artifact / FILE).is_file()


def test_run_deletes_what_its_precisions_were_calibrated_on(artifact: Path) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    size = (artifact / FILE).stat().st_size
    assert _delete_calibrations(artifact, ("fp16", "int8-smoothquant")) == {}
    assert _delete_calibrations(artifact, ("fp16", "int8", "int4")) == {FILE: size}
    assert not (artifact / FILE).exists()


def test_statistics_that_were_deleted_make_stale_what_was_made_of_others(artifact: Path) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    manifest = read_manifest(artifact)
    manifest["steps"]["quantize-int4"] = manifest["steps"]["quantize-int8"]
    write_manifest(artifact, manifest)
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=600))
    assert list(stale_steps(artifact, read_manifest(artifact))) == ["quantize-int4"]
    spend_step(artifact, "calibrate")
    assert list(stale_steps(artifact, read_manifest(artifact))) == ["quantize-int4"]


def test_deleted_statistics_are_taken_back_with_the_last_step_that_read_them(artifact: Path) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    spend_step(artifact, "calibrate")
    quantize(artifact, calibration=CalibrationOptions(calibration="none"))
    assert "calibrate" not in steps(artifact)


def test_a_calibration_that_only_an_older_smoothquant_read_is_taken_back(artifact: Path) -> None:
    quantize(artifact, calibration=ENOUGH)
    manifest = read_manifest(artifact)
    manifest["steps"]["quantize-int8-smoothquant"] = manifest["steps"].pop("quantize-int8")  # as they were made from the common file
    write_manifest(artifact, manifest)
    quantize(artifact, scheme="int8-smoothquant", calibration=ENOUGH)
    assert "calibrate" not in steps(artifact)
    assert not (artifact / FILE).exists()
    assert (artifact / STATIC_FILE).is_file()


def test_what_is_calibrated_for_a_step_that_was_interrupted_stays(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = CalibrationOptions(calibration_tokens=300)
    calibrate(artifact, "int8", few)  # and no quantize-int8 behind it
    quantize(artifact, scheme="int8-smoothquant", calibration=ENOUGH)
    assert "calibrate" in steps(artifact)
    assert (artifact / FILE).is_file()


def test_scores_changed_by_hand_are_measured_again_from_statistics_that_were_deleted(artifact: Path) -> None:
    few, limit = CalibrationOptions(calibration_tokens=300), PlacementOptions(max_perplexity_increase=50, sensitivity_tokens=64)
    quantize(artifact, calibration=few, placement=limit)
    scores = artifact / "scores-int8.json"
    before = scores.read_bytes()
    spend_step(artifact, "calibrate")
    scores.write_text("{}")
    quantize(artifact, calibration=few, placement=limit)
    assert json.loads(scores.read_bytes()).keys() == json.loads(before).keys()
    assert quantize(artifact, calibration=few, placement=limit).up_to_date


def test_what_an_interrupted_deletion_left_is_deleted_by_the_next(artifact: Path) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    content = (artifact / FILE).read_bytes()
    spend_step(artifact, "calibrate")
    (artifact / FILE).write_bytes(content)
    assert spend_step(artifact, "calibrate") == {FILE: len(content)}
    (artifact / FILE).write_bytes(content)
    quantize(artifact, calibration=CalibrationOptions(calibration="none"))
    assert not (artifact / FILE).exists()


def test_nothing_outside_the_folder_is_deleted(artifact: Path) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    mine = artifact.parent / "mine.txt"
    mine.write_text("x")
    manifest = read_manifest(artifact)
    outputs = manifest["steps"]["calibrate"]["outputs"]
    outputs["../mine.txt"] = outputs[FILE]
    write_manifest(artifact, manifest)
    spend_step(artifact, "calibrate")
    assert mine.exists()
    assert not (artifact / FILE).exists()


def test_run_makes_again_what_other_statistics_made_stale(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    manifest = read_manifest(artifact)
    manifest["steps"]["calibrate"]["outputs"][FILE]["sha256"] = "other"  # as if measured again with other threads
    assert list(stale_steps(artifact, manifest)) == ["quantize-int8"]
    asked: list[tuple[str, bool]] = []
    done = Outcome({"passed": True}, "")
    monkeypatch.setattr(run_module, "read_manifest", lambda folder: manifest)
    monkeypatch.setattr(run_module, "quantize", lambda folder, **given: asked.append((given["scheme"], given["force"])) or done)
    for step in ("fuse", "build_all", "validate"):
        monkeypatch.setattr(run_module, step, lambda *_, **__: done)
    run_module._after_export(artifact, ("int8", "int4"), run_module.RunOptions(), False, silent)
    assert asked == [("int8", False), ("int4", False), ("int8", False)]


def test_the_preflight_counts_the_tokens_that_are_calibrated_on(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assumed: list[str] = []
    monkeypatch.setattr("commands.calibrate.check_memory", lambda cost, folder: assumed.append(cost.assumption))
    quantize(artifact, calibration=CalibrationOptions(calibration_tokens=300))
    assert [words.split(" at ")[0] for words in assumed] == ["300 tokens"]


def test_the_command_of_a_calibration_has_the_options_of_quantize() -> None:
    options = CalibrationOptions("t.txt", 128).recorded() | {"sha256": "abc"}
    command = command_of(Path("art"), "calibrate", options)
    assert command == "python cli.py quantize art --calibration t.txt --calibration-tokens 128"


def test_metadata_of_the_statistics_is_json_free_of_paths(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the of and to " * 200)
    quantize(artifact, calibration=CalibrationOptions(str(tmp_path / "t.txt"), calibration_tokens=128))
    with (artifact / FILE).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"]["text"] == "t.txt"


def test_smoothquant_is_calibrated_through_the_command(artifact: Path) -> None:
    outcome = quantize(artifact, scheme="int8-smoothquant", calibration=ENOUGH)
    assert calibration(outcome)["text"] == "calibration.jsonl"
    assert outcome.report["w8a8"]["share"] == 1
    assert any(
        "100.0% of the layers' weights multiply int8 by int8" in sheet.title for sheet in summarize("quantize", outcome.report, up_to_date=False)
    )
    assert (artifact / "int8-smoothquant.onnx").is_file()
    assert quantize(artifact, scheme="int8-smoothquant", calibration=ENOUGH).up_to_date


def test_static_scales_ask_for_three_times_the_tokens(artifact: Path) -> None:
    with pytest.raises(QuantizationError, match=r"calibration\.jsonl has \d+ tokens, 24576 are needed for calibration"):
        quantize(artifact, scheme="int8-smoothquant")


def test_static_scales_have_a_calibration_of_their_own_and_leave_that_of_the_others(artifact: Path) -> None:
    quantize(artifact)
    before = (artifact / FILE).stat().st_mtime_ns
    quantize(artifact, scheme="int8-smoothquant", calibration=ENOUGH)
    recorded = read_manifest(artifact)["steps"]
    assert recorded["quantize-int8-smoothquant"]["inputs"].keys() >= {STATIC_FILE}
    assert FILE not in recorded["quantize-int8-smoothquant"]["inputs"]
    assert recorded["calibrate-int8-smoothquant"]["outputs"].keys() == {STATIC_FILE}
    assert (artifact / FILE).stat().st_mtime_ns == before
    assert not stale_steps(artifact, read_manifest(artifact))
    assert quantize(artifact).up_to_date
    command = command_of(artifact, "calibrate-int8-smoothquant", recorded["calibrate-int8-smoothquant"]["options"])
    assert command == f"python cli.py quantize {artifact} --calibration-tokens {ENOUGH.calibration_tokens} --scheme int8-smoothquant"


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_smoothquant_without_calibration_is_refused_with_the_reason(artifact: Path, has_tokenizer: bool) -> None:
    if not has_tokenizer:
        (artifact / "tokenizer.json").unlink()
    options = CalibrationOptions(calibration="none") if has_tokenizer else None
    reason = "--calibration none" if has_tokenizer else "no tokenizer.json"
    with pytest.raises(QuantizationError, match=reason) as caught:
        quantize(artifact, scheme="int8-smoothquant", calibration=options)
    assert caught.value.hint == "--scheme int8 is weight-only"
    assert not (artifact / "int8-smoothquant.onnx").exists()
