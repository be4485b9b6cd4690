"""A narrowed stage in every form of the report, streamed; and bad use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import onnx_ir as ir
import pytest

from artifact.errors import UsageError, ValidationError
from artifact.steps import StepContext
from commands import validate as validate_command
from commands.summary import summarize
from commands.validate import ValidateOptions, validate, validate_file
from exporter.checkpoints import Checkpoint
from validation.manner import Manner
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
NORM = "model.layers.1.post_attention_layernorm.RMSNormalization"


@pytest.fixture(scope="module")
def damaged(stages: Path, three_layers: Checkpoint, sabotage: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The report of an artifact whose fused graph has a wrong epsilon in layer 1, and whose int8 graph is sound; run layer by layer."""

    def edit(editor: Any) -> None:
        next(node for node in editor.graph if node.name == NORM).attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)

    artifact = sabotage(stages, tmp_path_factory.mktemp("damaged") / "three", "fused", edit)
    report = validate_artifact(
        StepContext(artifact),
        checkpoint=three_layers,
        stages=["fused", "int8"],
        text=None,
        tokens=None,
        manner=Manner(streamed=True, bisect=True),
    )
    return artifact, report


def test_json_names_the_node_and_the_stage_fails_by_it(damaged: tuple[Path, Any]) -> None:
    artifact, report = damaged
    assert json.loads((artifact / "reports/parity.json").read_text()) == json.loads(json.dumps(report))
    fused, int8 = report["stages"]
    assert (fused["bisect"]["found"]["node"], fused["bisect"]["found"]["layer"]) == (NORM, 1)
    assert fused["first_layer_outside"] == 1
    check = fused["checks"][-1]
    assert (check["check"], check["passed"], check["where"]) == ("narrowed_faults", False, NORM)
    assert re.search(rf"; narrowed to {NORM} \(RMSNormalization\): epsilon=0.0\d+ where 2 of 2 other layers have epsilon=", report["headline"])
    assert (int8["bisect"]["found"], int8["bisect"]["complete"], int8["checks"][-1]["passed"]) == (None, True, True)
    assert [row["stage"] for row in report["tolerances"] if row["check"] == "narrowed_faults"] == ["fused", "int8"]
    assert fused["seconds_by_part"]["bisect"] > 0


def test_markdown_html_junit_and_terminal_name_it(damaged: tuple[Path, Any]) -> None:
    artifact, report = damaged
    markdown, page = ((artifact / f"reports/parity.{suffix}").read_text() for suffix in ("md", "html"))
    assert "### Narrowed to the node" in markdown
    assert f"| fused | {NORM} (RMSNormalization) | layer 1, prefill, 96 tokens |" in markdown
    assert "- **int8**: nothing to narrow:" in markdown
    assert 'id="bisect"' in page
    assert page.count(NORM) >= 2
    cases = ET.parse(artifact / "reports/parity.xml").getroot().iter("testcase")  # our own file
    failed = {case.get("name"): case.find("failure") for case in cases if "narrowed_faults" in str(case.get("name"))}
    failure = failed[f"narrowed_faults [{NORM}]"]
    assert failure is not None
    assert "RMSNormalization" in str(failure.text)
    lines = [sheet.title for sheet in summarize("validate", report)]
    assert any(line.startswith(f"narrowed: fused: layer 1: {NORM} (RMSNormalization) in prefill, 96 tokens: ") for line in lines)


def test_bad_use_is_one_clear_error(stages: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="and has no node to narrow to nor profiles"):
        validate_file(tmp_path / "any.onnx", ValidateOptions(checkpoint="demo", bisect=True))
    with pytest.raises(UsageError, match="fused-engine is held against its stage as a whole, and not looked at") as raised:
        validate(stages, ValidateOptions(stages=("fused-engine",), bisect=True))
    assert raised.value.hint == "--stage fused --bisect"
    with pytest.raises(UsageError, match="--edges looks at a stage's layers"):
        validate(stages, ValidateOptions(stages=("fused-engine",), edges=True))


@pytest.mark.parametrize("asked", ["bisect", "edges"])
def test_a_look_that_does_not_fit_is_refused_before_anything_is_measured(stages: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    looked = []
    monkeypatch.setattr(validate_command, "closer_memory", lambda config, edges: looked.append(edges) or 10**15)
    with pytest.raises(ValidationError, match=r"validate needs about 1,?000,?000\.0 GB of memory"):
        validate(stages, ValidateOptions(stages=("traced",), **{asked: True}))
    assert looked == [asked == "edges"]
