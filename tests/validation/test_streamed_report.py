"""validate, layer by layer: the same report as of whole graphs, how it was run, and that the cuts were the graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from graphs import joined
from validation.manner import Manner
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports(quantized: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, numbers_text: Path) -> dict[bool, Report]:
    return {
        streamed: validate_artifact(
            StepContext(quantized),
            checkpoint=checkpoint,
            stages=["traced", "int8"],
            text=[numbers_text],
            tokens=256,
            manner=Manner(streamed=streamed),
        )
        for streamed in (True, False)
    }


@pytest.fixture(scope="module")
def numbers_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(str(number * number % 64) for number in range(600)))
    return path


def test_the_report_says_how_graphs_were_run_and_why(reports: dict[bool, Report]) -> None:
    assert reports[True]["execution"] == {"mode": "streamed", "reason": "asked for", "resumed": []}
    assert reports[False]["execution"] == {"mode": "whole", "reason": "asked for", "resumed": []}


def test_numbers_are_those_of_whole_graphs(reports: dict[bool, Report]) -> None:
    for ours, theirs in zip(reports[True]["stages"], reports[False]["stages"], strict=True):
        assert ours["passed"] == theirs["passed"]
        for key in ("mean_abs", "noise_ratio", "part_noise_ratio", "cache_error", "mean_kl", "perplexity", "top1_agreement", "scenario_spread"):
            assert ours[key] == theirs[key], (ours["stage"], key)
        assert ours["quality"]["greedy"] == theirs["quality"]["greedy"]
        for key in ("strict_noise_ratio", "worst_local_ratio", "range_peak"):  # node by node and layer by layer in both
            assert ours[key] == theirs[key]


def test_that_the_cuts_are_the_graph_is_a_check_of_every_streamed_stage(reports: dict[bool, Report]) -> None:
    for stage in reports[True]["stages"]:
        assert [check["passed"] for check in stage["checks"] if check["check"] == "joined_cuts"] == [True]
    assert {row["stage"] for row in reports[True]["tolerances"] if row["check"] == "joined_cuts"} == {"traced", "int8"}
    for stage in reports[False]["stages"]:
        assert stage["joined_cuts"] is None
        assert "joined_cuts" not in {check["check"] for check in stage["checks"]}


def test_cuts_that_are_not_the_graph_fail_and_are_named(artifact: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that loses a change on the way: the graph is right, what ran is not it."""
    cut_layer: Callable[..., Any] = joined.cut_layer

    def damaged(model: Any, layer: int) -> Any:
        cut = cut_layer(model, layer)
        if layer == 1:
            next(node for node in cut.graph if node.op_type == "Softmax").attributes["axis"] = ir.AttrInt64("axis", 2)
        return cut

    monkeypatch.setattr(joined, "cut_layer", damaged)
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=None, text=None, tokens=None, manner=Manner(streamed=True))
    (check,) = [check for check in report["stages"][0]["checks"] if check["check"] == "joined_cuts"]
    assert check["passed"] is False
    assert check["where"] == "output logits"
    assert report["passed"] is False
