"""Before a build: is there memory and disk for it? Refuse with numbers, not with a killed process after ten minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from artifact.errors import EngineError

MEGABYTE = 10**6
BASE_BYTES = 200 * MEGABYTE
LAYER_BYTES = 18 * MEGABYTE
WEIGHT_FACTOR = {True: 1.05, False: 1.75}
PLAN_BASE_BYTES = 8 * MEGABYTE
PLAN_LAYER_BYTES = 2 * MEGABYTE
PLAN_FACTOR = {True: 1.02, False: 1.75}
"""By whether the projections are packed: unpacked ones are stored twice in a plan with two profiles, all but o_proj, down_proj and lm_head."""


def memory_needed(weights_bytes: int, layers: int, *, packed: bool) -> int:
    """Anonymous memory that building takes at its peak, in bytes.

    An upper bound fitted to measured builds (TensorRT-RTX 1.7.1, two profiles; weights → peak, MB): 269 → 803 and 163 (int8) → 846 with 30
    layers, 880 → 1088 and 470 (int8) → 706 with 2, 13,476 → 13,300 with 32, 13,339 (int8) → 13,400 with 40. The weights' own map comes
    on top, but can be given back.
    """
    return BASE_BYTES + LAYER_BYTES * layers + int(WEIGHT_FACTOR[packed] * weights_bytes)


def plan_size(weights_bytes: int, layers: int, *, packed: bool) -> int:
    """Upper bound of a plan's bytes: the weights, and the kernels' source."""
    return PLAN_BASE_BYTES + PLAN_LAYER_BYTES * layers + int(PLAN_FACTOR[packed] * weights_bytes)


def check_room(folder: Path, weights_bytes: int, layers: int, *, packed: bool) -> None:
    """Refuse a build that this machine has no room for.

    Args:
        folder: where the plan will lie; need not exist yet.
        weights_bytes: of the graph, tied weights once.
        layers: decoder layers.
        packed: q·k·v and gate·up are one linear each.

    Raises:
        EngineError: too little memory or disk; both numbers are in the message.
    """
    needed, free = memory_needed(weights_bytes, layers, packed=packed), psutil.virtual_memory().available
    if needed > free:
        raise EngineError(
            f"building needs about {_gigabytes(needed)} of memory, {_gigabytes(free)} are free", hint="end other programs, or use a machine with more"
        )
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    size, space = plan_size(weights_bytes, layers, packed=packed), shutil.disk_usage(existing).free
    if size > space:
        raise EngineError(
            f"the plan needs about {_gigabytes(size)} of disk, {existing} has {_gigabytes(space)} free", hint="free some, or move the artifact"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
