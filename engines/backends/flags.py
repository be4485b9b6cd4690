"""What a build may ask of a compiler beside graph, profiles and target."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from artifact.errors import EngineError

LEVELS = range(6)
"""TensorRT's builder optimization levels; its default is 3."""
NO_CACHE = "none"
DECODE_GEMV = "--decode-gemv"


@dataclass(frozen=True)
class BuildFlags:
    """Options that not every backend has; at its default each asks for nothing. All but the last are enterprise TensorRT's.

    Attributes:
        version_compatible: the plan carries a lean runtime, and runs on later releases too.
        weight_streaming: weights may stay on the host and be streamed to the GPU as they are needed.
        strip_weights: the plan holds no weights that the graph holds; they are put back from it when the plan is loaded.
        optimization_level: 0 to 5: how long the builder looks for faster kernels.
        workspace_bytes: the most device memory that a kernel may use for itself.
        timing_cache: file of measured kernel times; None is the user's own, by release and GPU; ``none`` keeps none.
        decode_gemv: decode multiplies by a vector, in fewer kernels (``engines/decode_gemv.py``): TensorRT-RTX's, since it was read from its plans.
            None: where it suits (``engines/decode_form.py``).

    Raises:
        EngineError: a level or a size that TensorRT does not have.
    """

    version_compatible: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: str | None = None
    decode_gemv: bool | None = None

    def __post_init__(self) -> None:
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise EngineError(f"--optimization-level must be {LEVELS[0]} to {LEVELS[-1]}, got {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise EngineError(f"the workspace must be at least one byte, got {self.workspace_bytes}")
        if self.timing_cache is not None and self.timing_cache != NO_CACHE and Path(self.timing_cache).is_dir():
            raise EngineError(f"--timing-cache {self.timing_cache} is a folder", hint="name a file; it is made where there is none")

    def asked(self) -> list[str]:
        """The options that are not at their default."""
        return [_option(name, value) for name, value in self._given().items()]

    def recorded(self) -> dict[str, Any]:
        """Option → value as the command line takes it, of those that are not at their default: what decides a plan, as the manifest keeps it."""
        units = {"workspace_bytes": 1e9}
        given = {name: value / units[name] if name in units else value for name, value in self._given().items()}
        return {_option(name, value).strip("-").replace("-", "_"): True if value is False else value for name, value in given.items()}

    def _given(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    def as_record(self) -> dict[str, Any]:
        """Every one, as build.json keeps it."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


OPTIONS = {
    "version_compatible": "--version-compatible",
    "weight_streaming": "--weight-streaming",
    "strip_weights": "--strip-weights",
    "optimization_level": "--optimization-level",
    "workspace_bytes": "--workspace",
    "timing_cache": "--timing-cache",
    "decode_gemv": DECODE_GEMV,
}
"""Field → the option that sets it."""


def _option(name: str, value: Any) -> str:
    """``--decode-gemv``; ``--no-decode-gemv`` where it is turned off."""
    return OPTIONS[name].replace("--", "--no-", 1) if value is False else OPTIONS[name]
