from __future__ import annotations

import os
from pathlib import Path

import pytest

from artifact.changed import changed_files, require_unchanged
from artifact.errors import ArtifactError
from artifact.manifest import read_manifest, write_manifest
from artifact.steps import Report, StepContext, require, run_step


def write(step: StepContext) -> Report:
    for name in ("traced.onnx", "big.onnx"):
        with step.write(name) as path:
            path.write_bytes(b"x" * 100)
    return {}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    run_step(tmp_path, "export", {}, write)
    manifest = read_manifest(tmp_path)
    manifest["model"] = {"source": "demo", "dtype": "fp16"}
    write_manifest(tmp_path, manifest)
    return tmp_path


def test_nothing_is_changed_where_only_a_time_is(artifact: Path) -> None:
    os.utime(artifact / "traced.onnx", (1, 1))
    assert changed_files(artifact, read_manifest(artifact)) == {}


def test_changed_and_missing_files_are_named_with_their_step(artifact: Path) -> None:
    (artifact / "traced.onnx").write_bytes(b"y" * 100)
    (artifact / "big.onnx").unlink()
    assert changed_files(artifact, read_manifest(artifact)) == {"traced.onnx": "export", "big.onnx": "export"}
    assert changed_files(artifact, read_manifest(artifact), most_bytes=99) == {"big.onnx": "export"}


def test_a_step_refuses_a_file_changed_by_hand_and_names_it(artifact: Path) -> None:
    (artifact / "traced.onnx").write_bytes(b"y" * 100)
    with pytest.raises(ArtifactError, match=r"traced\.onnx is not the file that export wrote: it was changed since") as caught:
        run_step(artifact, "fuse", {}, lambda step: {})
    assert "python cli.py export --checkpoint demo" in str(caught.value.hint)
    assert "inspect" in str(caught.value.hint)


def test_whoever_asks_for_a_file_is_refused_one_that_was_changed(artifact: Path) -> None:
    assert require(artifact, "traced.onnx").is_file()
    (artifact / "traced.onnx").write_bytes(b"y" * 100)
    with pytest.raises(ArtifactError, match="it was changed since"):
        require(artifact, "traced.onnx")


def test_validate_takes_it_because_it_says_so_itself(artifact: Path) -> None:
    (artifact / "traced.onnx").write_bytes(b"y" * 100)
    assert run_step(artifact, "validate", {}, lambda step: {"done": True}).report == {"done": True}


def test_what_no_step_wrote_is_not_judged(artifact: Path) -> None:
    (artifact / "mine.onnx").write_bytes(b"")
    require_unchanged(artifact, read_manifest(artifact), "mine.onnx")
