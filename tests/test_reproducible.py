"""The same checkpoint gives the same bytes: in another folder, in another process, with another hash seed, with no trace kept from before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from artifact.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
MAKE = """
import sys
from pathlib import Path
from commands.export import ExportOptions, export
from commands.graphs import fuse, quantize
from exporter.checkpoints import CheckpointRequest
checkpoint, out = sys.argv[1:]
export(CheckpointRequest(checkpoint), Path(out), ExportOptions())
fuse(Path(out))
quantize(Path(out), scheme="int8")
quantize(Path(out), scheme="int4")
"""


def start(checkpoint: Path, folder: Path, seed: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", MAKE, str(checkpoint), str(folder / "artifact")], env=environment, cwd=ROOT)


def contents(artifact: Path) -> dict[str, bytes]:
    files = (path for path in artifact.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(artifact).as_posix(): path.read_bytes() for path in files}


@pytest.mark.trace
def test_two_processes_write_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    made = [start(tiny_checkpoint, tmp_path / name, seed) for name, seed in (("a", 1), ("another folder", 2))]
    assert [process.wait(timeout=300) for process in made] == [0, 0]
    first, second = (contents(tmp_path / name / "artifact") for name in ("a", "another folder"))
    assert {"traced.onnx", "fused.onnx", "int8.onnx", "int4.onnx", "weights/shared.safetensors"} <= first.keys()
    assert first.keys() == second.keys()
    assert [file for file in first if first[file] != second[file]] == []
    steps = [read_manifest(tmp_path / name / "artifact")["steps"] for name in ("a", "another folder")]
    hashes = [{file: record["sha256"] for step in each.values() for file, record in step["outputs"].items()} for each in steps]
    assert hashes[0] == hashes[1]
