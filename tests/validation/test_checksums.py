from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import ArtifactError
from artifact.manifest import read_manifest
from artifact.steps import run_step
from artifact.tensor_file import checksums_json, plan_tensors, write_tensors
from validation.checksums import command_of, verify_checksums

pytestmark = pytest.mark.parity
NAME = "model.layers.0.mlp.down_proj.weight"


def failures(artifact: Path) -> list[tuple[str, str | None]]:
    report = verify_checksums(artifact, read_manifest(artifact)).as_report()
    assert report["passed"] == (not report["failed"])
    return [(entry["file"], entry["tensor"]) for entry in report["failed"]]


def entry_of(artifact: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((artifact / "weights/checksums.json").read_text())[name]
    return entry


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_verify_counts_every_tensor_and_file_of_a_sound_artifact(artifact: Path) -> None:
    assert failures(artifact) == []
    tensors = len(json.loads((artifact / "weights/checksums.json").read_text()))
    assert verify_checksums(artifact, read_manifest(artifact)).verified > tensors + len(list((artifact / "weights").glob("*.safetensors")))


@pytest.mark.parametrize("at", ["first", "last"])
def test_verify_names_the_tensor_with_a_changed_byte(at: str, artifact: Path) -> None:
    entry = entry_of(artifact, NAME)
    flip(artifact / entry["file"], entry["offset"] + (0 if at == "first" else entry["length"] - 1))
    assert failures(artifact) == [(entry["file"], NAME)]


def test_verify_names_the_file_whose_header_was_changed(artifact: Path) -> None:
    file = entry_of(artifact, NAME)["file"]
    flip(artifact / file, 30)
    assert failures(artifact) == [(file, None)]


@pytest.mark.parametrize("file", ["traced.onnx", "config.json"])
def test_verify_names_a_changed_or_missing_file(file: str, artifact: Path) -> None:
    flip(artifact / file, 40)
    assert failures(artifact) == [(file, None)]
    (artifact / file).unlink()
    assert failures(artifact) == [(file, None)]


def test_verify_names_a_truncated_and_a_missing_weights_file(artifact: Path) -> None:
    entry = entry_of(artifact, NAME)
    path = artifact / entry["file"]
    path.write_bytes(path.read_bytes()[:-2])
    assert {file for file, _ in failures(artifact)} == {entry["file"]}
    assert len(failures(artifact)) == 2  # its last tensor, and its length
    path.unlink()
    assert failures(artifact) == [(entry["file"], None)]


def test_verify_refuses_a_graph_that_no_step_wrote(artifact: Path) -> None:
    (artifact / "fused.onnx").write_bytes((artifact / "traced.onnx").read_bytes())
    assert failures(artifact) == [("fused.onnx", None)]


def test_verify_finds_a_list_of_tensors_that_points_elsewhere(artifact: Path) -> None:
    path = artifact / "weights/checksums.json"
    entries = json.loads(path.read_text())
    entries[NAME]["offset"] += 2
    path.write_text(json.dumps(entries))
    found = failures(artifact)
    assert (entries[NAME]["file"], NAME) in found
    assert ("weights/checksums.json", None) in found  # the list itself is recorded in the manifest


def test_verify_never_reads_outside_the_artifact(artifact: Path) -> None:
    path = artifact / "weights/checksums.json"
    (artifact.parent / "outside").write_bytes(bytes(10_000))
    entries = {name: entry | {"file": "../outside"} for name, entry in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(entries))
    report = verify_checksums(artifact, read_manifest(artifact))
    assert {"file": "../outside", "tensor": None, "expected": f"{len(entries)} tensors", "got": "missing"} in report.failed


def test_verify_covers_the_tensors_that_quantisation_adds(artifact: Path) -> None:
    header, planned = plan_tensors("weights/int8-layer-000.safetensors", {"w": ("I8", (4, 2))})

    def write(step: Any) -> dict[str, Any]:
        with step.write(planned[0].file) as temporary:
            stored = write_tensors(temporary, header, planned, [memoryview(bytes(8))])
        with step.write("weights/int8-checksums.json") as temporary:
            temporary.write_text(checksums_json(stored))
        return {}

    (artifact / "fused.onnx").touch()  # what the step reads
    run_step(artifact, "quantize-int8", {}, write)
    (artifact / "fused.onnx").unlink()
    assert failures(artifact) == []
    flip(artifact / planned[0].file, planned[0].offset)
    assert failures(artifact) == [(planned[0].file, "w")]


def test_verify_needs_the_list_of_tensors(artifact: Path) -> None:
    (artifact / "weights/checksums.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no weights/checksums\.json"):
        verify_checksums(artifact, read_manifest(artifact))
    (artifact / "weights/checksums.json").write_text("{")
    assert ("weights/checksums.json", None) in failures(artifact)


def test_verify_says_how_a_stale_step_is_redone(artifact: Path) -> None:
    def write(step: Any) -> dict[str, Any]:
        with step.write("fused.onnx") as temporary:
            temporary.write_bytes(b"fused")
        return {}

    run_step(artifact, "fuse", {"target": "tensorrt", "allow_partial": False}, write)
    assert failures(artifact) == []
    manifest = read_manifest(artifact)
    manifest["steps"]["fuse"]["inputs"]["traced.onnx"] = "0" * 64
    (failed,) = verify_checksums(artifact, manifest).failed
    assert failed["file"] == "traced.onnx"
    assert failed["step"] == "fuse"
    assert failed["hint"] == f"python cli.py fuse {artifact} --target tensorrt"


@pytest.mark.parametrize(
    ("step", "options", "command"),
    [
        ("quantize-int8", {"scheme": "int8"}, "python cli.py quantize ART --scheme int8"),
        ("build-l4-fp16", {"optimization_level": 0, "no_decode_gemv": True}, "python cli.py build ART --optimization-level 0 --no-decode-gemv"),
        (
            "build-a100-80gb-int8",
            {"precision": "int8", "target": "a100-80gb", "max_batch": 4, "max_length": None},
            "python cli.py build ART --precision int8 --target a100-80gb --max-batch 4",
        ),
        ("fuse", {"target": "tensorrt", "allow_partial": True}, "python cli.py fuse ART --target tensorrt --allow-partial"),
        (
            "validate",
            {
                "stages": ["fused", "int8"],
                "text": ["0a1b"],
                "tokens": None,
                "checkpoint": {"checkpoint": "demo"},
                "device": "cpu",
                "baseline": "2c3d",
            },
            "python cli.py validate ART --device cpu",
        ),
        ("validate", {"stages": [], "text": [], "device": "cuda", "streamed": True}, "python cli.py validate ART --device cuda --streamed"),
    ],
)
def test_command_of_a_step_carries_its_options(step: str, options: dict[str, Any], command: str) -> None:
    assert command_of(Path("ART"), step, options) == command
