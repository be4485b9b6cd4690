"""The published schema: valid itself, shipped, met by real reports of every kind, and strict enough that a damaged report is refused."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_checkpoint, open_request
from exporter.export import export_checkpoint
from validation.lone.report import validate_graph
from validation.parity import validate_artifact
from validation.render import schema

Report = dict[str, Any]
SCHEMA = json.loads(schema.FILE.read_text(encoding="utf-8"))
PINNED = Path(__file__).parents[2] / "graphs" / "foreign" / "pinned"


def required(part: Report) -> list[str]:
    found: list[str] = part["required"]
    return found


def judged(artifact: Path, checkpoint: Checkpoint, stage: str) -> Report:
    return validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=[stage], text=None, tokens=None)


def test_schema_is_valid_and_says_its_version() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (SCHEMA["$id"], SCHEMA["properties"]["schema"]["const"]) == (schema.ID, schema.VERSION)
    assert SCHEMA["properties"]["schema_id"]["const"] == schema.ID


def test_schema_is_shipped_with_the_package() -> None:
    patterns = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["validation.render"]
    assert any(schema.FILE.match(pattern) for pattern in patterns)


def test_report_says_which_schema_it_is_of(sound_report: Report) -> None:
    assert (sound_report["schema"], sound_report["schema_id"]) == (schema.VERSION, schema.ID)


@pytest.mark.parity
def test_reports_of_artifacts_random_weights_and_lone_graphs_fit(
    complaints: Callable[[Report], list[str]],
    sound_report: Report,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Static caches, int8 with texts, plans and failures: wherever a test writes such a report, `every_report_fits_the_schema` holds it, too."""
    random = open_request(CheckpointRequest("random:0", config=tiny_checkpoint / "config.json"))
    run_step(tmp_path / "r", "export", {}, lambda step: export_checkpoint(step, random, dtype="fp16"))
    random_report = judged(tmp_path / "r", random, "traced")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lone = validate_graph(PINNED / "optimum-18.onnx", open_checkpoint(str(PINNED / "checkpoint")), out=tmp_path / "lone", text=None, tokens=None)
    reports = {
        "dynamic": sound_report,
        "random": random_report,
        "lone": json.loads((tmp_path / "lone" / "parity.json").read_text()),
    }
    assert {kind: complaints(report) for kind, report in reports.items()} == {kind: [] for kind in reports}
    assert "random weights" in reports["random"]["headline"]
    assert lone["graph"]["file"] == "optimum-18.onnx"


@pytest.mark.parity
def test_report_that_failed_fits(complaints: Callable[[Report], list[str]], artifact: Path, checkpoint: Checkpoint) -> None:
    with next(artifact.glob("weights/layer-*.safetensors")).open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x02")
    report = judged(artifact, checkpoint, "traced")
    assert report["passed"] is False
    assert complaints(report) == []


def lacking(report: Report) -> Iterator[tuple[str, Report]]:
    """The report with one required key less, at each place."""
    places = {(): SCHEMA, ("stages", 0): SCHEMA["$defs"]["stage"], ("stages", 0, "checks", 0): SCHEMA["$defs"]["check"]}
    for path, part in places.items():
        for key in required(part):
            damaged = copy.deepcopy(report)
            inner: Any = damaged
            for step in path:
                inner = inner[step]
            del inner[key]
            yield f"{path}.{key}", damaged


def test_schema_refuses_a_report_that_lacks_any_required_key(sound_report: Report) -> None:
    validator = Draft202012Validator(SCHEMA)
    accepted = [where for where, damaged in lacking(sound_report) if validator.is_valid(damaged)]
    assert accepted == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 1),
        (("passed",), "yes"),
        (("stages", 0, "mean_kl"), "0.1"),
        (("stages", 0, "noise_ratio"), -1.0),
        (("stages", 0, "checks", 0, "comparison"), "~"),
        (("stages", 0, "top1_agreement"), 1.5),
        (("cache", "form"), "paged"),
        (("texts",), []),
        (("hashes", "traced.onnx"), 7),
    ],
)
def test_schema_refuses_a_wrong_value(sound_report: Report, path: tuple[Any, ...], value: Any) -> None:
    damaged: Any = copy.deepcopy(sound_report)
    inner = damaged
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert not Draft202012Validator(SCHEMA).is_valid(damaged)


def test_a_key_that_nobody_described_is_found_here_and_allowed_to_readers(complaints: Callable[[Report], list[str]], sound_report: Report) -> None:
    report = sound_report | {"novelty": 1}
    assert any("novelty" in each for each in complaints(report))
    assert Draft202012Validator(SCHEMA).is_valid(report)
