"""An interrupted validation keeps the stages that it has measured, and the next run goes on from there; any other run does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact import steps
from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint
from validation import stages
from validation.parity import validate_artifact
from validation.resume import FOLDER, kept_stage

pytestmark = pytest.mark.parity


Edit = Callable[[Path, pytest.MonkeyPatch], None]


class Interrupted(Exception):
    pass


def run(artifact: Path, checkpoint: Checkpoint, tokens: int = 64) -> dict[str, Any]:
    def work(step: StepContext) -> dict[str, Any]:
        return validate_artifact(step, checkpoint=checkpoint, stages=["traced", "fused", "int8"], text=None, tokens=tokens)

    return run_step(artifact, "validate", {"tokens": tokens}, work, force=True).report


@pytest.fixture(scope="module")
def stopped(quantized: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped while int8 was measured; not its tokenizer's fault, so it has none."""
    artifact = Path(shutil.copytree(quantized, tmp_path_factory.mktemp("stopped") / "tiny"))
    (artifact / "tokenizer.json").unlink()
    measure = stages.measure_stage

    def stop(oracle: Any, stage: str, progress: Any) -> Any:
        if stage == "int8":
            raise Interrupted
        return measure(oracle, stage, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "measure_stage", stop)
        with pytest.raises(Interrupted):
            run(artifact, checkpoint)
    assert sorted(path.name for path in (artifact / FOLDER).iterdir()) == ["fused.npz", "traced.npz"]
    return artifact


@pytest.fixture
def interrupted(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on from."""
    return Path(shutil.copytree(stopped, tmp_path / "tiny", copy_function=shutil.copy2))


@pytest.fixture
def kept(interrupted: Path) -> Path:
    """The same; what is kept can be taken, so that a test which finds nothing shows what its edit did."""
    copy = Path(shutil.copytree(interrupted, interrupted.parent / "before", copy_function=shutil.copy2))
    assert None not in found(copy)
    return interrupted


def found(artifact: Path, *, tokens: int = 64, streamed: bool = False) -> list[Any]:
    """What the next run takes of the two stages that were kept."""
    taken: list[Any] = []

    def work(step: StepContext) -> dict[str, Any]:
        taken.extend(kept_stage(step, stage, streamed=streamed) for stage in ("traced", "fused"))
        return {}

    run_step(artifact, "validate", {"tokens": tokens}, work, force=True)
    return taken


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


def edit_graph(artifact: Path, patch: pytest.MonkeyPatch) -> None:
    model = ir.load(artifact / "traced.onnx")
    model.graph.node(0).name = "renamed"
    ir.save(model, artifact / "traced.onnx")


def edit_tokenizer(artifact: Path, patch: pytest.MonkeyPatch) -> None:
    (artifact / "tokenizer_config.json").write_text("{}\n")


def edit_rules(artifact: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "rules_hash", lambda patterns: "another")


def edit_versions(artifact: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "_versions", lambda packages: {"onnxruntime": "0.0"})


@pytest.mark.parametrize("edit", [edit_graph, edit_tokenizer, edit_rules, edit_versions])
def test_a_run_of_anything_else_takes_nothing_from_the_journal(edit: Edit, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(kept, monkeypatch)
    assert found(kept) == [None, None]


def test_a_run_with_other_options_takes_nothing_from_the_journal(kept: Path) -> None:
    assert found(kept, tokens=65) == [None, None]


def test_a_stage_that_was_run_in_another_form_is_not_taken(kept: Path) -> None:
    assert found(kept, streamed=True) == [None, None]


def test_a_graph_that_was_touched_and_holds_the_same_bytes_is_taken(interrupted: Path, checkpoint: Checkpoint) -> None:
    graph = interrupted / "traced.onnx"
    status = graph.stat()
    graph.write_bytes(graph.read_bytes())
    os.utime(graph, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert run(interrupted, checkpoint)["execution"]["resumed"] == ["traced", "fused"]  # touched, and the same bytes


def test_a_kept_stage_that_was_changed_is_measured_again(interrupted: Path, checkpoint: Checkpoint) -> None:
    path = interrupted / FOLDER / "traced.npz"
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    assert run(interrupted, checkpoint)["execution"]["resumed"] == ["fused"]
