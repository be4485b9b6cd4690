"""What a compiler must offer to make plans, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifact.progress import Progress
from engines.profiles import Profile
from engines.targets import Target


@dataclass(frozen=True)
class BuildRequest:
    """One plan to build: the graph, where its bytes go, and for what.

    Attributes:
        graph: ONNX file; its external data lies beside it.
        plan: file that the plan is streamed to.
    """

    graph: Path
    plan: Path
    target: Target
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class BuildResult:
    """What building took, parsing included.

    Attributes:
        peak_rss_mb: most memory that was resident at once, in 10^6 bytes.
        peak_anonymous_mb: the part of it that is no file's map, and so can't be given back.
        network_layers: what the parser made of the graph, before anything is fused.
        static_cache: what a static cache asks of a network, counted in it: ``attention_by_lengths``, ``caches_in_place``; 0 for a dynamic one.
    """

    seconds: float
    peak_rss_mb: int
    peak_anonymous_mb: int
    version: str
    network_layers: int
    static_cache: Mapping[str, int]


class Backend(Protocol):
    """One compiler."""

    name: str

    def unavailable(self) -> str | None:
        """Why it can't build here; None where it can."""

    def install_hint(self) -> str:
        """The command that brings it."""

    def version(self) -> str:
        """The compiler's version."""

    def build(self, request: BuildRequest, progress: Progress) -> BuildResult:
        """Build a plan.

        Raises:
            EngineError: the graph doesn't parse, the compiler would drop a part of what it says, or failed or died.
        """
