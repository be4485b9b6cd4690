"""What an engine is asked to be, and what building it may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.backends.flags import BuildFlags
from engines.profiles import DEFAULT_BATCH


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of one engine.

    Attributes:
        precision: a key of ``build.STAGES``.
        target: a name of ``targets``.
        backend: ``auto`` or a name of ``build.BACKENDS``.
        max_batch: rows.
        max_length: tokens in prompt and answer together; None is the model's, at most 4096. Of a dynamic cache only.
        capacity: the same for a static cache, which needs it; a ``Bucket`` stands in the names of folder and graph.
        flags: what else the compiler is asked for.
        parts: plans that the model is cut into; None: as few as fit the memory and the GPU.
        max_memory: bytes that building a plan may take; None: what is free.
    """

    precision: str
    target: str
    backend: str = "auto"
    max_batch: int = DEFAULT_BATCH
    max_length: int | None = None
    capacity: int | None = None
    flags: BuildFlags = field(default_factory=BuildFlags)
    parts: int | None = None
    max_memory: int | None = None
