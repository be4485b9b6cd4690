from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.one_position import gather_last_position
from validation.engine_graph import structural_difference

pytestmark = pytest.mark.parity
Report = dict[str, Any]
Rewrite = Callable[..., None]
Validate = Callable[[Path], Report]


def gather(model: ir.Model) -> None:
    gather_last_position(model.graph, "traced.onnx")


def gather_another_position(model: ir.Model) -> None:
    gather(model)
    model.graph.initializers["last_position"].const_value = ir.tensor(np.array([0], np.int64), name="last_position")


def gather_and_change_a_norm(model: ir.Model) -> None:
    gather(model)
    add = next(node for node in model.graph if node.op_type == "Add" and "layers.1.input_layernorm" in str(node.name))
    add.op_type = "Sub"


def swap_two_weights(model: ir.Model) -> None:
    gather(model)
    first, second = (model.graph.initializers[f"model.layers.{layer}.input_layernorm.weight"] for layer in (0, 1))
    first.const_value, second.const_value = second.const_value, first.const_value


def engine_entry(report: Report) -> Report:
    return next(entry for entry in report["stages"] if entry["stage"] == "traced-engine")


def failing(report: Report) -> set[str]:
    return {check["check"] for check in engine_entry(report)["checks"] if check["passed"] is False}


def test_an_engine_graph_equals_its_stage_at_the_gathered_position(artifact: Path, validate: Validate, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, gather, to="traced-engine.onnx")
    report = validate(artifact)
    assert report["passed"] is True
    entry = engine_entry(report)
    assert entry["engine_difference"] <= 2**-9
    assert entry["top1_agreement"] == 1.0
    assert [scenario["positions"] for scenario in entry["scenarios"]] == [1, 3, 18]
    assert report["verdict"] == "passed: 2 of 2 stages ran"


@pytest.mark.parametrize(
    ("edit", "checks"),
    [(gather_another_position, {"engine_difference"}), (gather_and_change_a_norm, {"engine_structure"})],
)
def test_validate_names_an_engine_graph_that_is_not_its_stage(
    edit: Callable[[ir.Model], None], checks: set[str], artifact: Path, validate: Validate, rewrite_graph: Rewrite
) -> None:
    rewrite_graph(artifact, edit, to="traced-engine.onnx")
    report = validate(artifact)
    assert report["passed"] is False
    assert report["headline"].startswith("traced-engine does not match")
    assert failing(report) >= checks


def test_an_engine_graph_can_be_measured_alone(artifact: Path, checkpoint: Any, rewrite_graph: Rewrite) -> None:
    from artifact.steps import StepContext
    from validation.parity import validate_artifact

    rewrite_graph(artifact, gather, to="traced-engine.onnx")
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=["traced-engine"], text=None, tokens=None)
    assert report["passed"] is True
    assert [entry["stage"] for entry in report["stages"]] == ["traced-engine"]


def test_overflow_around_lm_head_is_a_difference(
    artifact: Path, validate: Validate, rewrite_graph: Rewrite, overflow_around: Callable[..., None]
) -> None:
    """The same numbers in float32, so only the structure tells."""

    def gather_and_overflow(model: ir.Model) -> None:
        gather(model)
        overflow_around(model, "lm_head", 6000.0)

    rewrite_graph(artifact, gather_and_overflow, to="traced-engine.onnx")
    report = validate(artifact)
    assert report["passed"] is False
    assert failing(report) == {"engine_structure"}
    assert "output logits" in report["headline"]


def test_weights_read_from_another_place_are_a_difference(artifact: Path, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, swap_two_weights, to="swapped.onnx")
    assert structural_difference(artifact / "swapped.onnx", artifact / "traced.onnx") == [
        f"weight model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)
    ]


def test_structural_difference_names_the_first_node(artifact: Path, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, gather, to="same.onnx")
    rewrite_graph(artifact, gather_and_change_a_norm, to="other.onnx")
    assert structural_difference(artifact / "same.onnx", artifact / "traced.onnx") == []
    different = structural_difference(artifact / "other.onnx", artifact / "traced.onnx")
    assert "output present.1.key" in different
    assert any("layers.1.input_layernorm" in name for name in different)
    assert not any("layers.0." in name for name in different)
