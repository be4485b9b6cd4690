"""Steps made from files that are others now: found by the manifest alone, through every step that reads what a stale one wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cli
from artifact.errors import ArtifactError
from artifact.manifest import FORMAT, fingerprint, write_manifest
from artifact.stale import command_of, stale_steps
from artifact.step_kinds import STEPS
from artifact.steps import require

ART = Path("art")


def step(inputs: dict[str, str], outputs: dict[str, str], **options: Any) -> dict[str, Any]:
    return {"inputs": inputs, "outputs": {file: {"sha256": sha256} for file, sha256 in outputs.items()}, "options": options}


def manifest(traced: str = "t1", **steps: dict[str, Any]) -> dict[str, Any]:
    made = {
        "export": step({}, {"traced.onnx": traced}),
        "fuse": step({"traced.onnx": "t1"}, {"fused.onnx": "f1"}, target="tensorrt", allow_partial=False, min_tensorrt="10.0"),
        "quantize-int8": step({"fused.onnx": "f1"}, {"int8.onnx": "q1"}, scheme="int8"),
    }
    return {"format": FORMAT, "model": {}, "steps": made | steps}


def test_nothing_is_stale_where_every_input_is_what_was_written() -> None:
    assert stale_steps(ART, manifest()) == {}


def test_a_new_trace_makes_what_came_of_the_old_one_stale() -> None:
    stale = stale_steps(ART, manifest("t2"))
    assert {name: one.file for name, one in stale.items()} == {"fuse": "traced.onnx", "quantize-int8": "fused.onnx"}
    words = "fuse is stale: it was made from another traced.onnx; python cli.py fuse art --target tensorrt --min-tensorrt 10.0"
    assert stale["fuse"].words == words


@pytest.mark.parametrize("kind", STEPS)
def test_every_step_is_done_again_by_a_command_that_there_is(kind: str) -> None:
    name = kind if kind in ("export", "fuse", "validate") else f"{kind}-int8-smoothquant"
    command = command_of(ART, name, {"scheme": "int8-smoothquant"}).split()
    assert command[:2] == ["python", "cli.py"]
    assert command[2] in {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}


def test_a_file_that_a_fresh_step_wrote_too_is_not_stale() -> None:
    """Two engines of one stage write one engine graph."""
    old, new = step({"fused.onnx": "f0"}, {"fused-engine.onnx": "e0"}), step({"fused.onnx": "f1"}, {"fused-engine.onnx": "e1"})
    reader = step({"fused-engine.onnx": "e1"}, {})
    assert list(stale_steps(ART, manifest(**{"build-a": old, "build-b": new, "validate": reader}))) == ["build-a"]


def test_a_file_of_nobody_makes_nothing_stale() -> None:
    assert stale_steps(ART, manifest(validate=step({"tokenizer.json": "x"}, {}))) == {}


def test_a_stale_file_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for file in ("traced.onnx", "int8.onnx"):
        (tmp_path / file).touch()
    made = manifest("t2")
    made["steps"]["export"]["outputs"]["traced.onnx"] = fingerprint(tmp_path / "traced.onnx", "t2")
    write_manifest(tmp_path, made)
    assert require(tmp_path, "traced.onnx") == tmp_path / "traced.onnx"
    with pytest.raises(ArtifactError, match=r"int8\.onnx is stale: quantize-int8 made it from another fused\.onnx") as caught:
        require(tmp_path, "int8.onnx")
    assert caught.value.hint == f"python cli.py quantize {tmp_path} --scheme int8"
