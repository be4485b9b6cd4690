"""doctor: what this machine can do, what it can't, and how to get the rest."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = "torch transformers onnx onnx-ir onnxscript onnxruntime-gpu safetensors gguf polygraphy tensorrt-rtx-cu12 tensorrt".split()


def doctor() -> dict[str, Any]:
    """Look at the machine.

    Returns:
        machine {…}, versions {package: version or null}, can [{what, state, hint}] with state ``yes`` or ``no``.
    """
    versions = {package: _version(package) for package in PACKAGES}
    gpu = find_gpu()
    return {
        "machine": {
            "python": platform.python_version(),
            "cpu_cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "memory_available_gib": round(psutil.virtual_memory().available / 2**30, 1),
            "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
            "gpu": gpu,
        },
        "versions": versions,
        "can": [_can(*row) for row in _abilities(versions, gpu)],
    }


def find_gpu() -> str | None:
    """Name, memory and compute capability of the first NVIDIA GPU, as nvidia-smi says it; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _abilities(versions: dict[str, str | None], gpu: str | None) -> list[tuple[str, bool, str]]:
    return [
        ("export checkpoints to ONNX", bool(versions["torch"] and versions["onnxscript"]), "scripts/setup"),
        ("read GGUF files", bool(versions["gguf"]), "scripts/setup"),
        ("fuse and quantise graphs", bool(versions["onnxscript"] and versions["onnx-ir"]), "scripts/setup"),
        ("validate on the CPU", bool(versions["onnxruntime-gpu"] and versions["transformers"]), "scripts/setup"),
        ("build A100 engines without a GPU (TensorRT-RTX)", bool(versions["tensorrt-rtx-cu12"]), "pip install 'llama2trt[tensorrt-rtx]'"),
        ("build with enterprise TensorRT", False, "its backend is not written yet"),
        ("run engines", False, "running plans is not written yet" if gpu else "needs a machine with an NVIDIA GPU; running plans is not written yet"),
    ]


def _can(what: str, able: bool, hint: str) -> dict[str, str | None]:
    return {"what": what, "state": "yes" if able else "no", "hint": None if able else hint}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
