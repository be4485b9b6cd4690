"""`inspect` of a plan and of an artifact with engines: the passport, what does not belong together, and why a plan can't run here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.errors import ArtifactError
from artifact.hashing import sha256_of
from artifact.manifest import read_manifest, write_manifest
from artifact.steps import Report, StepContext, run_step
from commands import inspect_engine
from commands.inspect import inspect
from commands.summary import summarize
from engines import runnable

FOLDER = "engines/a100-80gb-fp16"
PLAN = f"{FOLDER}/part-00.plan"


def build(step: StepContext) -> Report:
    for name, text in (("fused-engine.onnx", "graph"), (PLAN, "plan")):
        with step.write(name) as path:
            path.write_text(text)
    entry = {
        "file": PLAN, "precision": "fp16", "target": "a100-80gb", "backend": "tensorrt-rtx", "tensorrt_version": "1.7.1.116", "bytes": 4,
        "compute_capability": "8.0", "profiles": {"decode": {"batch_size": [1, 1, 4]}}, "graph": "fused-engine.onnx",
        "plan_sha256": step.outputs[PLAN]["sha256"], "graph_sha256": step.outputs["fused-engine.onnx"]["sha256"],
    }  # fmt: skip
    report = {"engines": [entry], "passed": True}
    with step.write(f"{FOLDER}/build.json") as path:
        path.write_text(json.dumps(report))
    return report


@pytest.fixture
def artifact(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runnable, "runtime_module", lambda backend: SimpleNamespace(__version__="1.7.1.116"))
    model: Report = {"name": "tiny", "source": "demo", "format": "gguf", "fingerprint": "f00d", "dtype": "fp16"}
    model["config"] = asdict(LlamaConfig.from_hf(json.loads((tiny_checkpoint / "config.json").read_text())))
    write_manifest(tmp_path, {"format": 1, "model": model, "steps": {}})
    run_step(tmp_path, "build-a100-80gb-fp16", {"target": "a100-80gb"}, build)
    return tmp_path


def test_the_manifest_is_read_once(artifact: Path, a100: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(inspect_engine, "read_manifest", lambda folder: (read.append(folder), read_manifest(folder))[1])
    inspect(str(artifact / PLAN))
    assert read == [artifact]


def on_screen(report: Report) -> str:
    return "\n".join(f"{sheet.title} {sheet.rows}" for sheet in summarize("inspect", report, up_to_date=False))


def test_inspect_shows_a_plans_passport_and_that_it_runs_here(artifact: Path, a100: Any) -> None:
    report = inspect(str(artifact / PLAN))
    assert (report["passed"], report["as_built"], report["runs_here"], report["why_not_here"]) == (True, True, True, [])
    assert report["passport"] == read_manifest(artifact)["passports"]["a100-80gb-fp16"]
    assert report["passport"]["plans"][0]["plan_sha256"] == report["plan_sha256"]
    text = on_screen(report)
    assert "runs here: yes" in text
    assert "f00d" in text
    assert "not validated yet" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / PLAN).write_text("other"), f"{PLAN} is not the plan that was built"),
        (lambda folder: (folder / "fused-engine.onnx").write_text("other"), f"fused-engine.onnx is not the graph that {PLAN} was built from"),
        (
            lambda folder: (folder / FOLDER / "build.json").write_text((folder / FOLDER / "build.json").read_text() + " "),
            f"{FOLDER}/build.json is not the record that the build wrote",
        ),
    ],
)
def test_inspect_says_which_file_does_not_belong(artifact: Path, a100: Any, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(artifact)
    report = inspect(str(artifact / PLAN))
    assert (report["passed"], report["runs_here"]) == (False, False)
    assert report["words"].startswith(words)
    assert report["why_not_here"][0].startswith(words)
    described = inspect(str(artifact))
    assert [line for line in described["changed"] if line.split(" ")[0] in words]


def test_inspect_says_that_there_is_no_gpu_and_is_no_failure(artifact: Path) -> None:
    report = inspect(str(artifact / PLAN))
    (reason,) = report["why_not_here"]
    assert "GPU" in reason or "driver" in reason
    assert report["passed"] is True
    assert f"runs here: no: {reason}" in on_screen(report)
    (engine,) = inspect(str(artifact))["engines"].values()
    assert engine["why_not_here"] == reason
    assert engine["of"] == "tiny, fp16, for a100-80gb (8.0)"


def test_inspect_takes_a_plan_that_has_left_its_artifact(artifact: Path, a100: Any, tmp_path: Path) -> None:
    shutil.copytree(artifact / FOLDER, tmp_path / "elsewhere" / "x")
    report = inspect(str(tmp_path / "elsewhere" / "x" / "part-00.plan"))
    assert (report["passed"], report["as_built"], report["runs_here"], report["passport"]) == (None, True, True, None)
    assert report["words"] == "plan is the one recorded; its graph is not here; no manifest names its build.json"


@pytest.mark.parametrize("file", ["/part-00.plan", "/plans/part-00.plan"])
def test_a_plan_near_the_root_lies_in_no_artifact(file: str) -> None:
    assert inspect_engine._home(Path(file), {"file": PLAN})[0] == Path(file).parent


def test_a_graph_that_is_not_there_was_not_looked_at(artifact: Path, a100: Any) -> None:
    (artifact / "fused-engine.onnx").unlink()
    report = inspect(str(artifact / PLAN))
    assert (report["passed"], report["words"]) == (None, "plan is the one recorded; its graph is not here")


@pytest.mark.parametrize("key", ["plan_sha256", "backend", "tensorrt_version", "compute_capability", "target"])
def test_a_record_of_another_tool_is_refused_by_what_it_lacks(artifact: Path, a100: Any, key: str) -> None:
    record = artifact / FOLDER / "build.json"
    found = json.loads(record.read_text())
    del found["engines"][0][key]
    record.write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=rf"build\.json can't be read: an engine in it lacks '{key}'"):
        inspect(str(artifact / PLAN))


def test_every_file_is_hashed_once(artifact: Path, a100: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(runnable, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    inspect(str(artifact / PLAN))
    assert hashed == ["part-00.plan", "fused-engine.onnx"]


def test_an_engine_of_yesterdays_graph_is_stale(artifact: Path, a100: Any) -> None:
    manifest = read_manifest(artifact)
    manifest["passports"]["a100-80gb-fp16"]["stale"] = "build is stale: it was made from another fused.onnx"
    write_manifest(artifact, manifest)
    assert "stale" in inspect(str(artifact))["engines"]["a100-80gb-fp16"]["why_not_here"]
