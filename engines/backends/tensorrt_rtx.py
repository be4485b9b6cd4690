"""TensorRT-RTX: builds plans on a machine without a GPU, for the compute capabilities its release knows."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from artifact.progress import Progress
from engines.audit import audit_plan
from engines.backends.allocator import environment
from engines.backends.flags import BuildFlags
from engines.backends.protocol import AuditRequest, BuildRequest, BuildResult
from engines.backends.worker import MEGABYTE, USE_RTX, run_worker

NEEDED = {"tensorrt_rtx": "tensorrt-rtx-cu12", "polygraphy": "polygraphy"}
"""Module → the distribution that brings it."""
ENVIRONMENT = {USE_RTX: "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
"""Of the worker, beside its allocator's. Glibc's malloc gives a piece above a fixed threshold back as soon as it is freed: weights, above all."""


class TensorRTRTX:
    """The backend; see ``protocol.Backend``."""

    name = "tensorrt-rtx"

    def unavailable(self) -> str | None:
        """Name the distribution that is missing."""
        missing = [distribution for module, distribution in NEEDED.items() if find_spec(module) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def install_hint(self) -> str:
        """Both are on PyPI; neither needs a GPU or a driver to build."""
        return f"pip install {' '.join(NEEDED.values())}"

    def version(self) -> str:
        """The distribution's version, without loading its libraries."""
        return metadata.version(NEEDED["tensorrt_rtx"])

    def lacks(self, flags: BuildFlags) -> list[str]:
        """All of enterprise TensorRT's: without a driver most fail or do nothing (docs/adr/007), and the rest change no plan that was measured."""
        return replace(flags, decode_gemv=None).asked()

    def build(self, request: BuildRequest, progress: Progress) -> BuildResult:
        """Build in a worker process (``tensorrt_rtx_worker``), streamed to ``request.plan``."""
        message = {
            "graph": str(request.graph),
            "plan": str(request.plan),
            "compute_capability": request.target.compute_capability,
            "profiles": [dict(profile.shapes) for profile in request.profiles],
        }
        start = time.perf_counter()
        result, peak = run_worker("engines.backends.tensorrt_rtx_worker", message, ENVIRONMENT | environment(), progress)
        seconds = time.perf_counter() - start
        memory = (peak.resident // MEGABYTE, peak.anonymous // MEGABYTE)
        compiler = {"allocator": result["allocator"]}
        return BuildResult(round(seconds, 2), *memory, result["version"], result["network_layers"], result["static_cache"], compiler)

    def audit(self, request: AuditRequest, result: BuildResult) -> dict[str, Any]:
        """Read from the plan's bytes."""
        names = [profile.name for profile in request.profiles]
        return audit_plan(request.plan, request.graph, precision=request.precision, profiles=names, config=request.config, lowered=request.lowered)
