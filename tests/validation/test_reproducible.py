"""The same checkpoint gives the same bytes: in another folder, in another process, with another hash seed, with no trace kept from before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import sys
from pathlib import Path
from artifact.steps import run_step
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
checkpoint, out = open_checkpoint(sys.argv[1]), Path(sys.argv[2])
run_step(out, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
run_step(out, "fuse", {}, fuse_artifact)
run_step(out, "quantize-int8", {}, quantize_int8)
"""


def contents(artifact: Path, like: set[str]) -> dict[str, bytes]:
    files = [path for path in artifact.rglob("*") if path.is_file()]
    return {name: path.read_bytes() for path in files if (name := path.relative_to(artifact).as_posix()).split("/")[0] in like}


@pytest.mark.trace
def test_another_process_writes_the_same_bytes(quantized: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    environment = {"PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAKE, str(tiny_checkpoint), str(tmp_path / "another folder")]
    subprocess.run(command, env=os.environ | environment, cwd=ROOT, check=True, timeout=300)
    like = {"traced.onnx", "fused.onnx", "int8.onnx", "config.json", "weights"}
    first, second = contents(quantized, like), contents(tmp_path / "another folder", like)
    assert first.keys() == second.keys() >= {"traced.onnx", "fused.onnx", "int8.onnx", "weights/shared.safetensors"}
    assert [file for file in first if first[file] != second[file]] == []
