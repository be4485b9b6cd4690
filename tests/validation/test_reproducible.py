"""The same checkpoint gives the same bytes: in another folder, in another process, with another hash seed, with no trace kept from before.

What is calibrated, with as many threads: sums over threads round otherwise (docs/reproducibility.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from commands.calibrate import CalibrationOptions
from commands.graphs import quantize

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 128
MAKE = f"""
import shutil, sys
from pathlib import Path
from artifact.steps import run_step
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from commands.calibrate import CalibrationOptions
from commands.graphs import quantize
from graphs.quantize.int8 import quantize_int8
checkpoint, out = open_checkpoint(sys.argv[1]), Path(sys.argv[2])
run_step(out, "export", {{}}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
run_step(out, "fuse", {{}}, fuse_artifact)
run_step(out, "quantize-int8", {{}}, quantize_int8)
shutil.copy(sys.argv[3], out)
quantize(out, scheme="int8-smoothquant", calibration=CalibrationOptions(calibration_tokens={TOKENS}))
"""


def contents(artifact: Path, like: set[str]) -> dict[str, bytes]:
    files = [path for path in artifact.rglob("*") if path.is_file()]
    return {name: path.read_bytes() for path in files if (name := path.relative_to(artifact).as_posix()).split("/")[0] in like}


@pytest.fixture
def calibrated(quantized: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the int8 artifact with a second, calibrated scheme, made by one thread."""
    artifact, threads = Path(shutil.copytree(quantized, tmp_path / "here")), torch.get_num_threads()
    torch.set_num_threads(1)
    quantize(artifact, scheme="int8-smoothquant", calibration=CalibrationOptions(calibration_tokens=TOKENS))
    yield artifact
    torch.set_num_threads(threads)


@pytest.mark.trace
def test_another_process_writes_the_same_bytes(calibrated: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    environment = {"PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAKE, str(tiny_checkpoint), str(tmp_path / "another folder"), str(calibrated / "tokenizer.json")]
    subprocess.run(command, env=os.environ | environment, cwd=ROOT, check=True, timeout=300)
    like = {"traced.onnx", "fused.onnx", "int8.onnx", "int8-smoothquant.onnx", "calibration-int8-smoothquant.safetensors", "config.json", "weights"}
    first, second = contents(calibrated, like), contents(tmp_path / "another folder", like)
    assert first.keys() == second.keys() >= (like - {"weights"}) | {"weights/shared.safetensors"}
    assert [file for file in first if first[file] != second[file]] == []
