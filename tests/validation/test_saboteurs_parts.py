"""Faults of one row in one kind of call: too small for the mean of all positions, and named by the part that they are in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.manifest import fingerprint, read_manifest, sha256_of, write_manifest
from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
Report = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


class Editor:
    """Small integer arithmetic put before everything else in a graph, and fed to whatever used a value."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.made: list[ir.Node] = []

    def number(self, *values: int) -> ir.Value:
        name = f"saboteur.{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        self.graph.initializers.add(value)
        return value

    def op(self, name: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.Node("", name, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()])
        self.made.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=int(ir.DataType.INT64))

    def single(self) -> ir.Value:
        """[1] int64: 1 in calls of one token, 0 in others."""
        length = self.op("Shape", self.input(io_spec.INPUT_IDS), start=1, end=2)
        return self.cast(self.op("Equal", length, self.number(1)))

    def is_padded(self) -> ir.Value:
        """[B, 1] int64: 1 in rows with padding."""
        return self.op("Sub", self.number(1), self.op("ReduceMin", self.input(io_spec.ATTENTION_MASK), self.number(1), keepdims=1))

    def input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def replace(self, value: ir.Value, make: Callable[[], ir.Value]) -> None:
        users = list(value.uses())
        new = make()
        new.type, new.shape = value.type, value.shape
        for node, index in users:
            node.replace_input_with(index, new)
        self.graph.extend(self.made)
        self.made = []
        self.graph.sort()


def open_padding_in_steps(model: ir.Model) -> None:
    """The mask is all ones where S = 1."""
    editor = Editor(model)
    mask = editor.input(io_spec.ATTENTION_MASK)
    editor.replace(mask, lambda: editor.op("Max", mask, editor.single()))


def open_last_padding_in_steps(model: ir.Model) -> None:
    """Where S = 1, the mask begins one column too early: the padded row sees one column of padding."""
    editor = Editor(model)
    mask = editor.input(io_spec.ATTENTION_MASK)

    def earlier() -> ir.Value:
        ahead = editor.op("Slice", mask, editor.number(1), editor.number(2**31), editor.number(1))
        last = editor.op("Slice", mask, editor.number(-1), editor.number(2**31), editor.number(1))
        moved = editor.op("Concat", ahead, last, axis=1)
        return editor.op("Max", mask, editor.op("Mul", moved, editor.single()))

    editor.replace(mask, earlier)


def shift_padded_row_in_steps(model: ir.Model) -> None:
    """The padded row's position is one too small where S = 1."""
    editor = Editor(model)
    positions = editor.input(io_spec.POSITION_IDS)
    editor.replace(positions, lambda: editor.op("Sub", positions, editor.op("Mul", editor.single(), editor.is_padded())))


def read_other_rows_cache_in_steps(model: ir.Model) -> None:
    """Layer 0's keys of every row are the first row's where S = 1: right for that row, wrong for the padded one."""
    editor = Editor(model)
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


def sabotage(stages: Path, to: Path, stage: str, edit: Callable[[ir.Model], None]) -> Path:
    """A copy with one graph edited, as a bug of the step that made it would: recorded as that step's output."""
    artifact = Path(shutil.copytree(stages, to))
    graph = artifact / f"{stage}.onnx"
    model = ir.load(graph)
    edit(model)
    ir.save(model, graph)
    manifest = read_manifest(artifact)
    for step in manifest["steps"].values():
        for files in (step["inputs"], step["outputs"]):
            if graph.name in files:
                files[graph.name] = fingerprint(graph) if files is step["outputs"] else sha256_of(graph)
    write_manifest(artifact, manifest)
    return artifact


def measure(artifact: Path, checkpoint: Checkpoint, stage: str) -> tuple[Report, dict[str, str | None]]:
    """The report of one stage, and check → where of what failed."""
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=[stage], text=None, tokens=None)
    (entry,) = report["stages"]
    return report, {check["check"]: check["where"] for check in entry["checks"] if check["passed"] is False}


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
def test_undamaged_stages_pass_in_every_part(stage: str, stages: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    report, failed = measure(sabotage(stages, tmp_path / "tiny", stage, lambda model: None), checkpoint, stage)
    assert failed == {}
    assert report["passed"] is True
    parts = [part["where"] for entry in report["stages"][0]["scenarios"] for part in entry["parts"]]
    padded = [f"padded, row {row}, {part}" for row in (0, 1) for part in ("prompt", "steps")]
    assert parts == ["prefill, prompt", "decode, prompt", "decode, steps", "chunked, prompt", "chunked, chunk 2", "chunked, chunk 3", *padded]


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
@pytest.mark.parametrize("edit", SABOTEURS, ids=lambda edit: edit.__name__)
def test_a_fault_of_the_padded_rows_steps_is_named(
    edit: Callable[[ir.Model], None], stage: str, stages: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    report, failed = measure(sabotage(stages, tmp_path / "tiny", stage, edit), checkpoint, stage)
    assert report["checksums"]["passed"] is True
    assert report["passed"] is False
    assert report["headline"].startswith(f"{stage} does not match")
    assert failed["self_consistency"] == "padded, row 1, steps"
    assert failed["scenario_spread" if stage == "int8" else "part_noise_ratio"] == "padded, row 1, steps"


def test_a_fault_of_one_part_leaves_the_others_as_they_were(stages: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    report, _ = measure(sabotage(stages, tmp_path / "tiny", "int8", open_last_padding_in_steps), checkpoint, "int8")
    drifts = {part["where"]: part["self_consistency"] for entry in report["stages"][0]["scenarios"] for part in entry["parts"]}
    assert drifts.pop("padded, row 1, steps") > 10
    assert max(drifts.values()) < 1


def test_validate_ends_with_code_3_and_names_the_part(stages: Path, tmp_path: Path) -> None:
    artifact = sabotage(stages, tmp_path / "tiny", "int8", open_last_padding_in_steps)
    command = [sys.executable, ROOT / "cli.py", "validate", artifact, "--stage", "int8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 3, result.stderr
    assert "int8: self_consistency in padded, row 1, steps is" in result.stdout
    assert "self consistency" in (artifact / "reports/parity.md").read_text()
    assert "self_consistency [padded, row 1, steps]" in (artifact / "reports/parity.xml").read_text()
