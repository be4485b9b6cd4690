"""Whether a plan can run here, said before it is loaded: a plan is code, and its runtime refuses what it does not know without a word of use.

The runner, `validate`, `bench` and `inspect` ask this file alone, so that they say the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from artifact.hashing import sha256_of
from engines.device import Device

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backend → the Python module of its runtime."""


def why_not_here(artifact: Path, entry: Mapping[str, Any], device: Device | str) -> str | None:
    """The first reason why a plan can't run here; None where it can. See ``obstacles``."""
    return next(obstacles(artifact, entry, device), None)


def obstacles(artifact: Path, entry: Mapping[str, Any], device: Device | str) -> Iterator[str]:
    """Every reason why a plan can't run on this machine, found without loading it, each looked for when it is asked for.

    Args:
        artifact: the folder.
        entry: the plan's entry in ``build.json``.
        device: this machine's GPU, or why there is none.
    """
    if reason := _other_device(entry, device):
        yield reason
    yield from foreign_files(artifact, entry)
    if reason := _other_runtime(entry):
        yield reason


def made_for_another(entry: Mapping[str, Any], device: Device | str) -> Iterator[str]:
    """The reasons that are this machine's alone, its GPU and its runtime: the plan is as good as ever. No file is looked at."""
    yield from filter(None, (_other_device(entry, device), _other_runtime(entry)))


def foreign_files(artifact: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    """Which files do not belong together: the plan, and the graph beside it, must be those that the build recorded. A plan may be alone."""
    yield from filter(None, (foreign_plan(artifact, entry), foreign_graph(artifact, entry)))


def foreign_plan(artifact: Path, entry: Mapping[str, Any]) -> str | None:
    """Why a plan is not the one that was built; None where it is."""
    plan, name = artifact / entry["file"], entry["file"]
    if not plan.is_file():
        return f"{name} is not there"
    return _unlike(sha256_of(plan), entry["plan_sha256"], f"{name} is not the plan that was built")


def foreign_graph(artifact: Path, entry: Mapping[str, Any]) -> str | None:
    """Why the graph that is there is not the one that was built; None where it is, or where there is none."""
    graph, expected = artifact / entry.get("graph", ""), entry.get("graph_sha256")
    if expected is None or not graph.is_file():
        return None
    return _unlike(sha256_of(graph), expected, f"{entry['graph']} is not the graph that {entry['file']} was built from")


def _unlike(digest: str, expected: str, words: str) -> str | None:
    return None if digest == expected else f"{words} (SHA-256 {digest[:12]}…, expected {expected[:12]}…)"


def runtime_module(backend: str) -> ModuleType:
    """The runtime of a backend.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module(MODULES[backend])


def _other_device(entry: Mapping[str, Any], device: Device | str) -> str | None:
    if isinstance(device, str):
        return device
    wanted, found = entry["compute_capability"], ".".join(map(str, device.compute_capability))
    return None if wanted == found else f"built for compute capability {wanted} ({entry['target']}), this GPU ({device.name}) has {found}"


def _other_runtime(entry: Mapping[str, Any]) -> str | None:
    """Why what is installed can't load a plan; None where it can. A version-compatible one is loaded by later releases too."""
    backend, version = entry["backend"], entry["tensorrt_version"]
    newer = bool(entry.get("flags", {}).get("version_compatible"))
    if backend not in MODULES:
        return f"no runtime is known for plans of {backend!r}"
    try:
        module = runtime_module(backend)
    except ImportError as error:
        return f"its runtime can't be imported: {error}"
    here = str(module.__version__)
    fits = here == version or (newer and _numbers(here) > _numbers(version))
    return None if fits else f"built by {backend} {version}, here is {here}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
