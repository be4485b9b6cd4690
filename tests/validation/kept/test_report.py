"""Stages judged by the reference's kept predictions: without the checkpoint, and with the numbers of a validation that has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save

from artifact.errors import UsageError, ValidationError
from artifact.manifest import read_manifest
from artifact.steps import StepContext
from commands.against import read_against
from commands.compare import compare
from commands.validate import ValidateOptions
from exporter.checkpoints import Checkpoint, open_checkpoint
from validation import perplexity
from validation.kept.file import FORMAT, Kept, read_kept, to_bytes
from validation.kept.judge import make_oracle
from validation.kept.limits import kept_limits
from validation.kept.save import save_reference
from validation.measurement import StageMeasurement
from validation.part_kl import record_worst_part
from validation.prepare import prepare_oracle
from validation.row_result import RowResult
from validation.side import stage_side
from validation.watched import Watched, record_faults

Compare = Callable[..., dict[str, Any]]
Sabotage = Callable[[Path, Path, str, Callable[[Any], None]], Path]


@pytest.fixture(scope="module")
def saved(quantized: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """(artifact, quality of its stages by whole logits and what was said of the file, the file of kept predictions) on a text of number words."""
    root = tmp_path_factory.mktemp("kept")
    artifact = Path(shutil.copytree(quantized, root / "tiny"))
    words = np.random.default_rng(3).integers(0, 64, 2600).astype(str)
    (root / "numbers.txt").write_text(" ".join(words))
    file = root / "reference.safetensors"
    oracle = prepare_oracle(StepContext(artifact), checkpoint, "fp32", text=[root / "numbers.txt"], tokens=2048)
    found: dict[str, Any] = {"file": save_reference(file, oracle, checkpoint, 24)}
    for stage in ("fused", "int8"):
        runner = stage_side(artifact, read_manifest(artifact), stage).open(oracle.scenarios, streamed=False)
        logits = [runner.logits(window.inputs) for window in oracle.windows]
        assert oracle.judge is not None
        found[stage] = oracle.judge.describe(perplexity.score(oracle.windows, logits.__getitem__, oracle.window_logits))["all"]
    return artifact, found, file


@pytest.fixture
def judge(saved: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> Compare:
    """The comparison of something with the kept predictions, as the command makes it."""

    def run(target: Path | None = None, **options: Any) -> dict[str, Any]:
        asked = ValidateOptions(**({"against": read_against(str(saved[2]))} | options))
        return compare(target or saved[0], asked, out=tmp_path / "reports")

    return run


def entry(report: dict[str, Any], stage: str) -> dict[str, Any]:
    return next(one for one in report["stages"] if one["stage"] == stage)


def test_numbers_are_those_of_a_validation_with_the_checkpoint(saved: tuple[Path, dict[str, Any], Path], judge: Compare) -> None:
    found = judge(stages=("fused", "int8"))
    assert found["passed"] is True
    for stage in ("fused", "int8"):
        ours, theirs = entry(found, stage), saved[1][stage]
        assert ours["mean_kl"] == pytest.approx(theirs["mean_kl"], rel=0.05)
        assert 0 < ours["kl_lower_bound"] < theirs["mean_kl"]
        for key in ("perplexity", "top1_agreement", "top5_agreement"):
            assert ours["quality"]["all"][key] == pytest.approx(theirs[key], rel=1e-5), key
        assert ours["perplexity_se_pct"] == pytest.approx(theirs["perplexity_se_pct"], rel=1e-3)
    assert [one["scenario"] for one in entry(found, "int8")["scenarios"]] == ["prefill", "decode", "chunked", "padded"]


def test_the_report_says_what_it_stands_on(saved: tuple[Path, dict[str, Any], Path], judge: Compare, tmp_path: Path) -> None:
    found = judge(stages=("int8",))
    assert found["against"]["file"] == saved[1]["file"]
    assert found["against"]["file"]["bytes_per_position"] == 24 * 6 + 16 * 6 + 8
    written = json.loads((tmp_path / "reports" / "parity.json").read_text())
    assert written["against"]["kind"] == "kept"
    assert "Against kept predictions" in (tmp_path / "reports" / "parity.md").read_text()
    assert "Against kept predictions" in (tmp_path / "reports" / "parity.html").read_text()
    assert 'name="part_kl' in (tmp_path / "reports" / "parity.xml").read_text()


def test_no_checkpoint_is_opened(saved: tuple[Path, dict[str, Any], Path], judge: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a checkpoint was opened")

    monkeypatch.setattr("exporter.checkpoints.open_request", refuse)
    monkeypatch.setattr("commands.validate.open_request", refuse)
    assert judge(stages=("fused",))["passed"] is True


def failed(report: dict[str, Any], stage: str) -> dict[str, str | None]:
    return {check["check"]: check["where"] for check in entry(report, stage)["checks"] if check["passed"] is False}


def test_a_wrong_scale_is_found_everywhere(saved: tuple[Path, dict[str, Any], Path], judge: Compare, sabotage: Sabotage, tmp_path: Path) -> None:
    def double_logits(editor: Any) -> None:
        last = editor.graph.outputs[0].producer().inputs[0]
        editor.replace(last, lambda: editor.op("Add", last, last))

    found = judge(sabotage(saved[0], tmp_path / "scaled", "int8", double_logits), stages=("int8",))
    assert found["passed"] is False
    assert failed(found, "int8").keys() == {"perplexity_increase_pct", "mean_kl", "part_kl"}
    assert found["headline"].startswith("int8 does not match: perplexity_increase_pct")


def test_a_mask_that_leaks_in_padded_steps_is_found_in_its_part(
    saved: tuple[Path, dict[str, Any], Path], judge: Compare, sabotage: Sabotage, open_padding_in_steps: Callable[[Any], None], tmp_path: Path
) -> None:
    """A fault of eight positions of one row, which no text shows."""

    found = judge(sabotage(saved[0], tmp_path / "leaking", "fused", open_padding_in_steps), stages=("fused",))
    assert failed(found, "fused") == {"part_kl": "padded, row 1, steps"}


def test_a_lone_graph_needs_no_checkpoint(saved: tuple[Path, dict[str, Any], Path], judge: Compare) -> None:
    found = judge(saved[0] / "fused.onnx")
    assert found["passed"] is True
    assert entry(found, "fused.onnx")["mean_kl"] == pytest.approx(saved[1]["fused"]["mean_kl"], rel=0.05)


def test_streamed_gives_the_same(judge: Compare) -> None:
    whole, streamed = (judge(stages=("fused",), streamed=way) for way in (False, True))
    assert entry(whole, "fused")["mean_kl"] == entry(streamed, "fused")["mean_kl"]
    assert entry(whole, "fused")["scenarios"] == entry(streamed, "fused")["scenarios"]


def test_other_checkpoints_predictions_are_refused(saved: tuple[Path, dict[str, Any], Path], judge: Compare, tmp_path: Path) -> None:
    other = replace(read_kept(saved[2]), model={"name": "other", "fingerprint": "f" * 64, "source": "x", "format": "safetensors"})
    (tmp_path / "other.safetensors").write_bytes(to_bytes(other))
    with pytest.raises(ValidationError, match=r"of another checkpoint: there other \(ffffffffffff\), here tiny"):
        judge(against=read_against(str(tmp_path / "other.safetensors")))


def test_files_that_are_something_else_are_one_error(saved: tuple[Path, dict[str, Any], Path], tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(ValidationError, match="holds no predictions of a reference: its header has no llama2trt-reference"):
        read_kept(tiny_checkpoint / "model.safetensors")
    (tmp_path / "short.safetensors").write_bytes(saved[2].read_bytes()[:-10])
    with pytest.raises(ValidationError, match="can't be read"):
        read_kept(tmp_path / "short.safetensors")


def test_a_changed_file_is_refused(saved: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    with safe_open(saved[2], framework="numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["top_logits"][0, 0] += 1
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(ValidationError, match="was changed after it was written"):
        read_kept(tmp_path / "changed.safetensors")


def test_sequences_of_other_lengths_are_one_error(saved: tuple[Path, dict[str, Any], Path]) -> None:
    kept = read_kept(saved[2])
    shorter = replace(kept, sequences=[kept.sequences[0][:-1], kept.sequences[1]])
    with pytest.raises(ValidationError, match=r"the kept sequences have 95 and \d+ tokens, this release's scenarios 96 and"):
        make_oracle(shorter)


def test_a_file_is_the_same_bytes_again(saved: tuple[Path, dict[str, Any], Path]) -> None:
    kept: Kept = read_kept(saved[2])
    assert to_bytes(kept) == saved[2].read_bytes()


def test_options_that_do_not_go_together_are_refused(judge: Compare, tmp_path: Path) -> None:
    for options, name in (({"texts": (tmp_path,)}, "--text"), ({"max_kl": 0.1}, "--max-kl"), ({"bisect": True}, "--bisect")):
        with pytest.raises(UsageError, match=f"{name} don't go together"):
            judge(**options)


def test_random_ids_are_judged_by_scenarios_alone(sound_artifact: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(sound_artifact, tmp_path / "artifact"))
    file = tmp_path / "reference.safetensors"
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    save_reference(file, prepare_oracle(StepContext(artifact), checkpoint, "fp32", text=None, tokens=None), checkpoint, 16)
    found = compare(artifact, ValidateOptions(against=read_against(str(file))), out=tmp_path / "reports")
    assert found["passed"] is True
    assert found["stages"][0]["perplexity"] is None
    assert found["headline"].startswith("structure proven, quality not: random token ids")


def test_every_kind_must_be_finite_and_whole_and_int4_no_more(saved: tuple[Path, dict[str, Any], Path]) -> None:
    int8 = stage_side(saved[0], read_manifest(saved[0]), "int8")
    int4 = replace(int8, kind="int4")
    assert {row.check for row in kept_limits(int8, streamed=False)} == {"mean_kl", "perplexity_increase_pct", "part_kl", "nonfinite_logits"}
    assert {row.check for row in kept_limits(int4, streamed=False)} == {"nonfinite_logits"}
    assert {row.check for row in kept_limits(replace(int4, kv_cache="static"), streamed=True)} == {"nonfinite_logits", "stray_slots", "joined_cuts"}


def test_strays_and_cuts_are_judged(saved: tuple[Path, dict[str, Any], Path], judge: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judge(stages=("fused",), streamed=True)
    assert entry(found, "fused")["joined_cuts"] == 0
    side = replace(stage_side(saved[0], read_manifest(saved[0]), "fused"), kv_cache="static")
    opened: Any = SimpleNamespace(
        one_position=False, joined=["output logits"], run=lambda _: [RowResult(np.arange(1), np.zeros((1, 2)), strays=["slot 5"])]
    )
    watched, measured = Watched(opened, side), StageMeasurement()
    for _ in range(2):
        watched.run(make_oracle(read_kept(saved[2])).scenarios[0])
    record_faults(measured, watched)
    assert (measured.numbers["stray_slots"], measured.where["stray_slots"]) == (1, "prefill, row 0: slot 5")
    assert (measured.numbers["joined_cuts"], measured.where["joined_cuts"]) == (1, "output logits")


def test_a_graph_that_can_not_be_run_is_an_entry_that_says_why(judge: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValidationError("no such operator")

    monkeypatch.setattr("validation.side.open_runner", refuse)
    found = judge(stages=("fused",))
    assert failed(found, "fused") == {"runs": None}
    assert "no such operator" in found["headline"]


def test_a_part_that_is_not_finite_is_the_worst() -> None:
    measured = StageMeasurement()
    record_worst_part(measured, [(float("nan"), "prefill, prompt"), (0.1, "decode, steps")])
    assert np.isnan(measured.numbers["part_kl"])
    assert measured.where["part_kl"] == "prefill, prompt"


def test_a_changed_header_is_refused(saved: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    with safe_open(saved[2], framework="numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    about = json.loads(metadata[FORMAT])
    about["model"]["fingerprint"] = "f" * 64
    save_file(tensors, tmp_path / "changed.safetensors", {FORMAT: json.dumps(about)})
    with pytest.raises(ValidationError, match="was changed after it was written"):
        read_kept(tmp_path / "changed.safetensors")


def test_a_text_without_its_name_is_refused(saved: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    (tmp_path / "nameless.safetensors").write_bytes(to_bytes(replace(read_kept(saved[2]), texts=[{"sha256": "0", "kind": "text", "bos": None}])))
    with pytest.raises(ValidationError, match="is not a whole file of predictions: a text without name"):
        read_kept(tmp_path / "nameless.safetensors")


def test_a_checkpoint_in_bfloat16_is_one_error(tmp_path: Path) -> None:
    torch_save({"weight": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "bf16.safetensors", {"format": "pt"})
    with pytest.raises(ValidationError, match="holds no predictions of a reference"):
        read_kept(tmp_path / "bf16.safetensors")
