"""On what a report was made: versions and the machine, without anything that says whose it is."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from artifact.cores import cores

PACKAGES = (
    *("torch", "transformers", "tokenizers", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "onnxruntime"),
    *("tensorrt-rtx-cu12", "polygraphy"),
)
GPU_DEVICE = Path("/dev/nvidiactl")


def versions() -> dict[str, str]:
    """Python and the packages that decide a number; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """cpu, cores that may be used, memory_gib, gpu (True where a driver is loaded, else None)."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": "NVIDIA" if GPU_DEVICE.exists() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
