"""Stages that have no limit for quality: their structure may fail, and nothing of them is called proven."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifact import io_spec
from artifact.steps import run_step
from commands import graphs
from exporter.checkpoints import Checkpoint
from exporter.export import export_checkpoint

pytestmark = pytest.mark.parity
STAGE = "int4-onnxruntime"


@pytest.fixture(scope="module")
def stages(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 artifact, which has no floor, down to int4; not to be changed."""
    artifact = tmp_path_factory.mktemp("int4") / "tiny"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    graphs.fuse(artifact, target="onnxruntime")
    graphs.quantize(artifact, scheme="int4", target="onnxruntime")
    return artifact


def test_sound_int4_is_judged_by_its_structure_and_never_passes(stages: Path, sabotage: Any, measure: Any, tmp_path: Path) -> None:
    report, _ = measure(sabotage(stages, tmp_path / "tiny", STAGE, lambda editor: None), STAGE)
    (stage,) = report["stages"]
    checks = {check["check"]: check["passed"] for check in stage["checks"]}
    assert checks["scenario_spread"] is True
    assert "self_consistency" not in checks  # a step rounds otherwise than a prompt in the 4-bit kernel
    assert (report["passed"], stage["passed"]) == (None, None)
    assert report["headline"] == f"{STAGE}: measured, not judged: int4 has no limit for quality"
    assert report["verdict"].startswith("not judged: ")


def test_int4_whose_decode_is_wrong_fails_without_a_floor(stages: Path, sabotage: Any, measure: Any, tmp_path: Path) -> None:
    def shift_decode(editor: Any) -> None:
        """Every call of one token sees the position before."""
        positions = editor.input(io_spec.POSITION_IDS)
        editor.replace(positions, lambda: editor.op("Sub", positions, editor.single()))

    report, failed = measure(sabotage(stages, tmp_path / "tiny", STAGE, shift_decode), STAGE)
    assert report["passed"] is False
    assert failed["scenario_spread"].endswith("steps")
