"""doctor: what this machine can do, what it can't, and how to get the rest."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from artifact.hub_folder import cache_folder
from engines import device
from engines.backends.tensorrt import TensorRT
from engines.device import Device
from engines.targets import TARGETS

PACKAGES = "torch transformers onnx onnx-ir onnxscript onnxruntime-gpu safetensors gguf huggingface_hub polygraphy tensorrt-rtx-cu12 tensorrt".split()


def doctor(*, ask_hub: bool = False) -> dict[str, Any]:
    """Look at the machine.

    Args:
        ask_hub: ask the Hugging Face hub whether it answers; nothing else here touches the network.

    Returns:
        machine {…, gpu: in words or null, targets: [those whose plans run on it]}, versions {package: version or null}, hub {…},
        can [{what, state, hint}] with state ``yes``, ``no`` or ``not asked``.
    """
    versions = {package: _version(package) for package in PACKAGES}
    gpu, hub = device.find_device(), _hub(bool(versions["huggingface_hub"]), ask_hub)
    return {
        "machine": {
            "python": platform.python_version(),
            "cpu_cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "memory_available_gib": round(psutil.virtual_memory().available / 2**30, 1),
            "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
            "gpu": _named(gpu),
            "targets": _fitting(gpu),
        },
        "versions": versions,
        "hub": hub,
        "can": [_can(*row) for row in _abilities(versions, gpu, hub)],
    }


def _named(gpu: Device | str) -> str | None:
    """A GPU in words; None where there is none."""
    if isinstance(gpu, str):
        return None
    return f"{gpu.name}, compute capability {'.'.join(map(str, gpu.compute_capability))}, {gpu.memory_bytes / 2**30:.1f} GiB"


def _fitting(gpu: Device | str) -> list[str]:
    """The targets whose plans run on a GPU."""
    return [] if isinstance(gpu, str) else [target.name for target in TARGETS.values() if target.compute_capability == gpu.compute_capability]


def _why_no_plans(versions: dict[str, str | None], gpu: Device | str) -> str | None:
    """Why plans don't run here; None where they do."""
    if isinstance(gpu, str):
        return gpu
    if not _fitting(gpu):
        built = sorted({target.compute_capability for target in TARGETS.values()})
        return f"no target has this GPU's compute capability; plans are built for {', '.join(f'{major}.{minor}' for major, minor in built)}"
    if not (versions["polygraphy"] and any(versions[package] for package in ("tensorrt-rtx-cu12", "tensorrt"))):
        return "pip install 'llama2trt[tensorrt-rtx]'"
    return None


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


def _abilities(versions: dict[str, str | None], gpu: Device | str, hub: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    why, enterprise = _why_no_plans(versions, gpu), TensorRT().unavailable()
    return [
        ("export checkpoints to ONNX", bool(versions["torch"] and versions["onnxscript"]), "scripts/setup"),
        ("read GGUF files", bool(versions["gguf"]), "scripts/setup"),
        ("fetch published models (--size, ORG/NAME)", *_fetching(bool(versions["huggingface_hub"]), hub)),
        ("fuse and quantise graphs", bool(versions["onnxscript"] and versions["onnx-ir"]), "scripts/setup"),
        ("validate on the CPU", bool(versions["onnxruntime-gpu"] and versions["transformers"]), "scripts/setup"),
        ("build A100 engines without a GPU (TensorRT-RTX)", bool(versions["tensorrt-rtx-cu12"]), "pip install 'llama2trt[tensorrt-rtx]'"),
        ("build with enterprise TensorRT (--backend tensorrt), on the GPU that is here", enterprise is None, enterprise or ""),
        ("run engines", why is None, why or ""),
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
