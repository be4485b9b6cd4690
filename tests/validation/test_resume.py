"""An interrupted validation keeps the stages that it has measured, and the next run goes on from there; any other run does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint
from validation import stages
from validation.parity import validate_artifact
from validation.resume import FOLDER

pytestmark = pytest.mark.parity


class Interrupted(Exception):
    pass


def run(artifact: Path, checkpoint: Checkpoint, tokens: int = 64) -> dict[str, Any]:
    def work(step: StepContext) -> dict[str, Any]:
        return validate_artifact(step, checkpoint=checkpoint, stages=["traced", "fused", "int8"], text=None, tokens=tokens)

    return run_step(artifact, "validate", {"tokens": tokens}, work, force=True).report


@pytest.fixture
def interrupted(quantized: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stopped while int8 was measured; not its tokenizer's fault, so it has none."""
    artifact = Path(shutil.copytree(quantized, tmp_path / "tiny"))
    (artifact / "tokenizer.json").unlink()
    measure = stages.measure_stage

    def stop(oracle: Any, stage: str, progress: Any) -> Any:
        if stage == "int8":
            raise Interrupted
        return measure(oracle, stage, progress)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "measure_stage", stop)
        with pytest.raises(Interrupted):
            run(artifact, checkpoint)
    assert sorted(path.name for path in (artifact / FOLDER).iterdir()) == ["fused.npz", "traced.npz"]
    return artifact


def test_the_next_run_measures_what_is_left_and_clears_up(interrupted: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, measure = [], stages.measure_stage
    monkeypatch.setattr(stages, "measure_stage", lambda oracle, stage, progress: measured.append(stage) or measure(oracle, stage, progress))
    report = run(interrupted, checkpoint)
    assert measured == ["int8"]
    assert report["execution"]["resumed"] == ["traced", "fused"]
    assert report["passed"] is True
    assert not (interrupted / FOLDER).exists()
    again = run(interrupted, checkpoint)
    assert measured == ["int8", "traced", "fused", "int8"]
    assert again["execution"]["resumed"] == []
    for ours, theirs in zip(report["stages"], again["stages"], strict=True):
        assert {key: ours[key] for key in ("mean_abs", "noise_ratio", "checks", "scenarios")} == {
            key: theirs[key] for key in ("mean_abs", "noise_ratio", "checks", "scenarios")
        }


def test_a_run_with_other_options_or_another_graph_measures_all(interrupted: Path, checkpoint: Checkpoint) -> None:
    graph = interrupted / "traced.onnx"
    status = graph.stat()
    kept = shutil.copytree(interrupted, interrupted.parent / "other", copy_function=shutil.copy2)
    assert run(Path(kept), checkpoint, tokens=65)["execution"]["resumed"] == []
    graph.write_bytes(graph.read_bytes() + b"")
    os.utime(graph, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert run(interrupted, checkpoint)["execution"]["resumed"] == ["traced", "fused"]  # touched, and the same bytes


def test_a_kept_stage_that_was_changed_is_measured_again(interrupted: Path, checkpoint: Checkpoint) -> None:
    path = interrupted / FOLDER / "traced.npz"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    assert run(interrupted, checkpoint)["execution"]["resumed"] == ["fused"]
