"""Faults of one row in one kind of call: too small for the mean of all positions, and named by the part that they are in."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.steps import run_step
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8

pytestmark = pytest.mark.parity
Report = dict[str, Any]
Edit = Callable[[Any], None]
Sabotage = Callable[[Path, Path, str, Edit], Path]
Measure = Callable[[Path, str], tuple[Report, dict[str, str | None]]]
RunCli = Callable[..., subprocess.CompletedProcess[str]]


def open_padding_in_steps(editor: Any) -> None:
    """The mask is all ones where S = 1."""
    mask = editor.input(io_spec.ATTENTION_MASK)
    editor.replace(mask, lambda: editor.op("Max", mask, editor.single()))


def open_last_padding_in_steps(editor: Any) -> None:
    """Where S = 1, the mask begins one column too early: the padded row sees one column of padding."""
    mask = editor.input(io_spec.ATTENTION_MASK)

    def earlier() -> ir.Value:
        ahead = editor.op("Slice", mask, editor.number(1), editor.number(2**31), editor.number(1))
        last = editor.op("Slice", mask, editor.number(-1), editor.number(2**31), editor.number(1))
        moved = editor.op("Concat", ahead, last, axis=1)
        return editor.op("Max", mask, editor.op("Mul", moved, editor.single()))

    editor.replace(mask, earlier)


def shift_padded_row_in_steps(editor: Any) -> None:
    """The padded row's position is one too small where S = 1."""
    positions = editor.input(io_spec.POSITION_IDS)
    editor.replace(positions, lambda: editor.op("Sub", positions, editor.op("Mul", editor.single(), editor.is_padded())))


def read_other_rows_cache_in_steps(editor: Any) -> None:
    """Layer 0's keys of every row are the first row's where S = 1: right for that row, wrong for the padded one."""
    past = editor.input(io_spec.past_name(0, io_spec.CACHE_KINDS[0]))

    def first_rows() -> ir.Value:
        start, step = (editor.op("Squeeze", editor.number(value)) for value in (0, 1))
        rows = editor.op("Range", start, editor.op("Squeeze", editor.op("Shape", past, start=0, end=1)), step)
        return editor.op("Gather", past, editor.op("Sub", rows, editor.op("Mul", rows, editor.single())), axis=0)

    editor.replace(past, first_rows)


SABOTEURS = (open_padding_in_steps, open_last_padding_in_steps, shift_padded_row_in_steps, read_other_rows_cache_in_steps)


@pytest.fixture(scope="module")
def stages(sound_artifact: Path, sound_report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traced, fused and int8; not to be changed."""
    assert sound_report["passed"]
    artifact = Path(shutil.copytree(sound_artifact, tmp_path_factory.mktemp("stages") / "tiny"))
    run_step(artifact, "fuse", {}, fuse_artifact)
    run_step(artifact, "quantize-int8", {}, quantize_int8)
    return artifact


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
def test_undamaged_stages_pass_in_every_part(stage: str, stages: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path) -> None:
    report, failed = measure(sabotage(stages, tmp_path / "tiny", stage, lambda editor: None), stage)
    assert failed == {}
    assert report["passed"] is True
    parts = [part["where"] for entry in report["stages"][0]["scenarios"] for part in entry["parts"]]
    padded = [f"padded, row {row}, {part}" for row in (0, 1) for part in ("prompt", "steps")]
    assert parts == ["prefill, prompt", "decode, prompt", "decode, steps", "chunked, prompt", "chunked, chunk 2", "chunked, chunk 3", *padded]


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
@pytest.mark.parametrize("edit", SABOTEURS, ids=lambda edit: edit.__name__)
def test_a_fault_of_the_padded_rows_steps_is_named(
    edit: Edit, stage: str, stages: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path
) -> None:
    report, failed = measure(sabotage(stages, tmp_path / "tiny", stage, edit), stage)
    assert report["checksums"]["passed"] is True
    assert report["passed"] is False
    assert report["headline"].startswith(f"{stage} does not match")
    assert failed["self_consistency"] == "padded, row 1, steps"
    assert failed["scenario_spread" if stage == "int8" else "part_noise_ratio"] == "padded, row 1, steps"


def test_a_fault_of_one_part_leaves_the_others_as_they_were(stages: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path) -> None:
    report, _ = measure(sabotage(stages, tmp_path / "tiny", "int8", open_last_padding_in_steps), "int8")
    drifts = {part["where"]: part["self_consistency"] for entry in report["stages"][0]["scenarios"] for part in entry["parts"]}
    assert drifts.pop("padded, row 1, steps") > 10
    assert max(drifts.values()) < 1


def test_validate_ends_with_code_3_and_names_the_part(stages: Path, sabotage: Sabotage, tmp_path: Path, run_cli: RunCli) -> None:
    artifact = sabotage(stages, tmp_path / "tiny", "int8", open_last_padding_in_steps)
    result = run_cli("validate", artifact, "--stage", "int8", code=3)
    assert "int8: self_consistency in padded, row 1, steps is" in result.stdout
    assert "self consistency" in (artifact / "reports/parity.md").read_text()
    assert "self_consistency [padded, row 1, steps]" in (artifact / "reports/parity.xml").read_text()
