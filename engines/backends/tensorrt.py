"""Enterprise TensorRT: builds on the GPU that the plan is for, with a timing cache and the options of its documented API.

Written against that API and held to the signatures of its bindings (tests/engines/backends/test_signatures.py); docs/adr/026 says what has run.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from artifact.errors import EngineError
from artifact.io_spec import CAPACITY
from artifact.progress import Progress
from artifact.user_cache import cache_folder
from engines.backends.flags import DECODE_GEMV, NO_CACHE, BuildFlags
from engines.backends.protocol import AuditRequest, BuildRequest, BuildResult
from engines.backends.worker import MEGABYTE, USE_RTX, run_worker
from engines.device import Device, find_device
from engines.inspected_audit import audit_inspected
from engines.targets import Target

NEEDED = {"tensorrt": "tensorrt", "polygraphy": "polygraphy"}
"""Module → the distribution that brings it."""
OLDEST = (10, 15)
"""The first release whose parser has RotaryEmbedding, RMSNormalization and TensorScatter."""
OLDEST_STATIC = (11, 0)
"""The first whose bindings let attention be masked by lengths: ``IAttention.causal_kind`` and ``key_value_lengths``."""


class TensorRT:
    """The backend; see ``protocol.Backend``."""

    name = "tensorrt"

    def unavailable(self) -> str | None:
        """The first thing that is missing: a distribution, its libraries, a GPU, a release that is new enough."""
        missing = [distribution for module, distribution in NEEDED.items() if find_spec(module) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        version, reason = import_version()
        if reason is not None:
            return reason
        if isinstance(gpu := find_device(), str):
            return gpu
        return (
            None if release(version) >= OLDEST else f"TensorRT {version} is too old: {_dotted(OLDEST)} is the first whose parser takes these graphs"
        )

    def install_hint(self) -> str:
        """Its libraries are NVIDIA's own to give; the container brings all."""
        return "containers/Dockerfile brings TensorRT for a machine with its GPU; --backend tensorrt-rtx builds without one"

    def version(self) -> str:
        """The library's version."""
        return import_version()[0]

    def lacks(self, flags: BuildFlags) -> list[str]:
        """What was only read from plans of TensorRT-RTX."""
        return [DECODE_GEMV] if flags.decode_gemv else []

    def build(self, request: BuildRequest, progress: Progress) -> BuildResult:
        """Build in a worker process (``tensorrt_worker``), streamed to ``request.plan``.

        Raises:
            EngineError: as ``protocol.Backend``; or this machine's GPU is not the target's.
        """
        gpu, version = find_device(), self.version()
        _check_target(gpu, request.target)
        _check_static(request, version)
        assert isinstance(gpu, Device)
        cache = timing_cache_file(request.flags, version, gpu.name)
        message = {
            "graph": str(request.graph),
            "plan": str(request.plan),
            "profiles": [dict(profile.shapes) for profile in request.profiles],
            "flags": request.flags.as_record(),
            "timing_cache": str(cache) if cache else None,
        }
        start = time.perf_counter()
        result, peak = run_worker("engines.backends.tensorrt_worker", message, {USE_RTX: "0"}, progress)
        seconds = round(time.perf_counter() - start, 2)
        memory = (peak.resident // MEGABYTE, peak.anonymous // MEGABYTE)
        engine: dict[str, Any] = result["engine"]
        compiler = {
            "gpu": gpu.name,
            "timing_cache": {"file": message["timing_cache"], "state": result["timing_cache"]},
            **{key: engine[key] for key in ("device_memory_bytes", "streamable_weights_bytes", "refittable")},
        }
        counted = result["static_cache"]
        return BuildResult(seconds, *memory, result["version"], result["network_layers"], counted, compiler, engine)

    def audit(self, request: AuditRequest, result: BuildResult) -> dict[str, Any]:
        """From what TensorRT says of the loaded plan."""
        return audit_inspected(request.plan, request.graph, result.inspection, profiles=request.profiles, config=request.config)


def timing_cache_file(flags: BuildFlags, version: str, gpu: str) -> Path | None:
    """Where kernel times are kept: the file asked for, or the user's own of this release and GPU; None where none are to be kept."""
    if flags.timing_cache == NO_CACHE:
        return None
    name = f"tensorrt-{version}-{re.sub(r'[^A-Za-z0-9.]+', '-', gpu).strip('-')}.timing"
    return Path(flags.timing_cache).resolve() if flags.timing_cache else cache_folder() / name


def release(version: str) -> tuple[int, int]:
    """(major, minor) of ``11.1.0.106``."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _check_target(gpu: Device | str, target: Target) -> None:
    """Refuse a target that is not this machine's GPU: TensorRT measures kernels on the GPU that is there."""
    if isinstance(gpu, str):
        raise EngineError(f"TensorRT builds on the GPU that the plan is for: {gpu}", hint="--backend tensorrt-rtx builds without a GPU")
    if gpu.compute_capability != target.compute_capability:
        raise EngineError(
            f"TensorRT builds for the GPU that is there, {gpu.name} of compute capability {_dotted(gpu.compute_capability)}; "
            f"{target.name} has {_dotted(target.compute_capability)}",
            hint="python cli.py doctor says which targets are this GPU's; --backend tensorrt-rtx builds for another",
        )


def _check_static(request: BuildRequest, version: str) -> None:
    """Refuse a static cache where attention can't be masked by lengths."""
    if release(version) < OLDEST_STATIC and any(CAPACITY in profile.axes for profile in request.profiles):
        raise EngineError(
            f"a static cache needs TensorRT {_dotted(OLDEST_STATIC)}, whose attention can be masked by lengths; here is {version}",
            hint="export with --kv-cache dynamic, or build with a newer TensorRT",
        )


@cache
def import_version() -> tuple[str, str | None]:
    """The version of the library that Python finds, and why it can't be imported; asked in a process of its own, because loading it is heavy."""
    command = [sys.executable, "-P", "-c", "import tensorrt; print(tensorrt.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return "", f"tensorrt can't be imported: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return done.stdout.split()[-1], None


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
