"""Before a step: is there memory and disk for it? Refuse with numbers, not with a killed process after ten minutes. What it needs, estimate says."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import EngineError, ExportError, FusionError, QuantizationError, ToolkitError, ValidationError
from artifact.room import existing_folder, free_disk, free_memory, gigabytes
from engines.build_cost import BuildCost
from engines.step_cost import StepCost

ERRORS: dict[str, type[ToolkitError]] = {
    "export": ExportError,
    "fuse": FusionError,
    "calibrate": QuantizationError,
    "smoothing": QuantizationError,
    "sensitivity": QuantizationError,
    "placement": QuantizationError,
    "quantize": QuantizationError,
    "build": EngineError,
    "validate": ValidationError,
}
"""Step → what it fails with."""
MORE_MEMORY = "end other programs, or use a machine with more"
MORE_DISK = "free some, or move the artifact"


def check_step(cost: StepCost, artifact: Path, *, replaced: int = 0) -> None:
    """Refuse a step that this machine has no room for.

    Args:
        cost: what it takes.
        artifact: where it writes; need not exist yet.
        replaced: bytes of what it writes that are there already, from an earlier run, and go.

    Raises:
        ToolkitError: the step's own; too little memory or disk, both numbers in the message.
    """
    _check(ERRORS[cost.step], cost.step, cost.memory_bytes, cost.disk_bytes - replaced, artifact, MORE_MEMORY)


def check_memory(cost: StepCost, artifact: Path) -> None:
    """As ``check_step``, for a step that adds little to the disk, or looks at it itself."""
    _check(ERRORS[cost.step], cost.step, cost.memory_bytes, 0, artifact, MORE_MEMORY)


def check_build(cost: BuildCost, folder: Path, *, what: str = "the build", max_memory: int | None = None) -> None:
    """Refuse a plan that this machine has no room to build.

    Args:
        cost: what it takes.
        folder: where the plan will lie.
        what: `the build`, or which part of it.
        max_memory: bytes that it may take, asked for; in the place of what is free.

    Raises:
        EngineError: too little memory or disk.
    """
    if max_memory is not None and cost.memory_bytes > max_memory:
        raise EngineError(
            f"{what} needs about {gigabytes(cost.memory_bytes)} of memory, --max-memory is {gigabytes(max_memory)}", hint="--parts auto"
        )
    memory = cost.memory_bytes if max_memory is None else 0
    _check(EngineError, what, memory, cost.plan_bytes, folder, f"--parts auto cuts it to fit; or {MORE_MEMORY}")


def check_disk(plans_bytes: int, folder: Path) -> None:
    """Refuse plans that a folder's disk has no room for, all of them together."""
    _check(EngineError, "the build", 0, plans_bytes, folder, MORE_MEMORY)


def _check(error: type[ToolkitError], what: str, memory: int, disk: int, folder: Path, hint: str) -> None:
    free, space = free_memory(), free_disk(folder)
    if memory > free:
        raise error(f"{what} needs about {gigabytes(memory)} of memory, {gigabytes(free)} are free", hint=hint)
    if disk > space:
        raise error(f"{what} needs about {gigabytes(disk)} of disk, {existing_folder(folder)} has {gigabytes(space)} free", hint=MORE_DISK)
