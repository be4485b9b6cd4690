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

from artifact.hub_folder import cache_folder

PACKAGES = "torch transformers onnx onnx-ir onnxscript onnxruntime-gpu safetensors gguf huggingface_hub polygraphy tensorrt-rtx-cu12 tensorrt".split()


def doctor(*, ask_hub: bool = False) -> dict[str, Any]:
    """Look at the machine.

    Args:
        ask_hub: ask the Hugging Face hub whether it answers; nothing else here touches the network.

    Returns:
        machine {…}, versions {package: version or null}, hub {…}, can [{what, state, hint}] with state ``yes``, ``no`` or ``not asked``.
    """
    versions = {package: _version(package) for package in PACKAGES}
    gpu, hub = find_gpu(), _hub(bool(versions["huggingface_hub"]), ask_hub)
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
        "hub": hub,
        "can": [_can(*row) for row in _abilities(versions, gpu, hub)],
    }


def find_gpu() -> str | None:
    """Name, memory and compute capability of the first NVIDIA GPU, as nvidia-smi says it; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _hub(installed: bool, ask: bool) -> dict[str, Any]:
    """Where published models are kept, whether a token is set, and, where it was asked, whether the hub answers (null: nobody asked)."""
    report: dict[str, Any] = {"cache": str(cache_folder()), "endpoint": None, "logged_in": None, "offline": None, "reachable": None, "why": None}
    if not installed:
        return report | {"why": "huggingface_hub is not installed"}
    from huggingface_hub import constants, get_token

    report |= {"endpoint": constants.ENDPOINT, "logged_in": get_token() is not None, "offline": constants.HF_HUB_OFFLINE}
    if not ask:
        return report
    from artifact.errors import CheckpointError
    from artifact.presets import repository
    from exporter.checkpoints.hub import published_files

    try:
        published_files(repository("7b"), None)
    except CheckpointError as error:
        return report | {"reachable": False, "why": str(error)}
    return report | {"reachable": True}


def _abilities(versions: dict[str, str | None], gpu: str | None, hub: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    return [
        ("export checkpoints to ONNX", bool(versions["torch"] and versions["onnxscript"]), "scripts/setup"),
        ("read GGUF files", bool(versions["gguf"]), "scripts/setup"),
        ("fetch published models (--size, ORG/NAME)", *_fetching(bool(versions["huggingface_hub"]), hub)),
        ("fuse and quantise graphs", bool(versions["onnxscript"] and versions["onnx-ir"]), "scripts/setup"),
        ("validate on the CPU", bool(versions["onnxruntime-gpu"] and versions["transformers"]), "scripts/setup"),
        ("build A100 engines without a GPU (TensorRT-RTX)", bool(versions["tensorrt-rtx-cu12"]), "pip install 'llama2trt[tensorrt-rtx]'"),
        ("build with enterprise TensorRT", False, "its backend is not written yet"),
        ("run engines", False, "running plans is not written yet" if gpu else "needs a machine with an NVIDIA GPU; running plans is not written yet"),
    ]


def _fetching(installed: bool, hub: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether models can be fetched, as far as it was asked, and why not or how to know."""
    if not installed:
        return False, "pip install 'llama2trt[hub]'"
    if hub["offline"]:
        return False, "HF_HUB_OFFLINE is set: only what the local cache holds"
    return hub["reachable"], hub["why"] or "doctor --hub asks"


def _can(what: str, able: bool | None, hint: str) -> dict[str, str | None]:
    return {"what": what, "state": {True: "yes", False: "no", None: "not asked"}[able], "hint": None if able else hint}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
