"""What a compiler must offer to make plans, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from artifact.config import LlamaConfig
from artifact.progress import Progress
from engines.backends.flags import BuildFlags
from engines.profiles import Profile
from engines.targets import Target


@dataclass(frozen=True)
class BuildRequest:
    """One plan to build: the graph, where its bytes go, and for what.

    Attributes:
        graph: ONNX file; its external data lies beside it.
        plan: file that the plan is streamed to.
        flags: what else the compiler is asked for.
    """

    graph: Path
    plan: Path
    target: Target
    profiles: tuple[Profile, ...]
    flags: BuildFlags = field(default_factory=BuildFlags)


@dataclass(frozen=True)
class BuildResult:
    """What building took, parsing included.

    Attributes:
        peak_rss_mb: most memory that was resident at once, in 10^6 bytes.
        peak_anonymous_mb: the part of it that is no file's map, and so can't be given back.
        network_layers: what the parser made of the graph, before anything is fused.
        static_cache: what a static cache asks of a network, counted in it: ``attention_by_lengths``, ``caches_in_place``; 0 for a dynamic one.
        compiler: what else build.json keeps of it, as its backend says.
        inspection: what the backend's audit reads beside the plan; empty where the plan says it all.
    """

    seconds: float
    peak_rss_mb: int
    peak_anonymous_mb: int
    version: str
    network_layers: int
    static_cache: Mapping[str, int]
    compiler: Mapping[str, Any] = field(default_factory=dict)
    inspection: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditRequest:
    """A plan, and what it must hold.

    Attributes:
        plan: the file.
        graph: what it was built from.
        precision: as asked.
        profiles: in the plan's order.
        config: of the model.
        lowered: whether the graph's attention was written in the operators of an older release.
    """

    plan: Path
    graph: Path
    precision: str
    profiles: Sequence[Profile]
    config: LlamaConfig
    lowered: bool = False


class Backend(Protocol):
    """One compiler."""

    name: str

    def unavailable(self) -> str | None:
        """Why it can't build here; None where it can."""

    def install_hint(self) -> str:
        """The command that brings it."""

    def version(self) -> str:
        """The compiler's version."""

    def lacks(self, flags: BuildFlags) -> list[str]:
        """The options among ``flags`` that it does not have."""

    def build(self, request: BuildRequest, progress: Progress) -> BuildResult:
        """Build a plan.

        Raises:
            EngineError: the graph doesn't parse, the compiler would drop a part of what it says, or failed or died.
        """

    def audit(self, request: AuditRequest, result: BuildResult) -> dict[str, Any]:
        """What is inside a plan that it built: ``kernels``, ``kernels_by_profile``, ``kernels_by_layer``, ``bytes_per_weight``, ``audit``.

        Raises:
            EngineError: the plan can't be read.
        """
