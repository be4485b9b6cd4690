"""What is free on this machine: memory, and disk where a folder is or will be."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

WHOLE_SHARE, WHOLE_BESIDES = 0.25, 2_000_000_000
"""Of the free memory that a graph loaded whole may take: packed for the processor a weight exists twice for a while, and caches come on top; and what
is left free for what is beside it, the reference and logits (engines/step_costs.py counts both)."""


def free_memory() -> int:
    """Bytes that programs can have without others being ended or swapped out."""
    return int(psutil.virtual_memory().available)


def fits_whole(float32_bytes: int, free_bytes: int) -> bool:
    """Whether weights in float32 are few enough beside what is free that a graph is loaded whole; if not it is run one layer at a time."""
    return float32_bytes <= WHOLE_SHARE * (free_bytes - WHOLE_BESIDES)


def existing_folder(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.resolve().parents) if path.is_dir())


def free_disk(folder: Path) -> int:
    """Bytes free on the disk that holds a folder; it need not exist yet."""
    return shutil.disk_usage(existing_folder(folder)).free


def gigabytes(size: int) -> str:
    """`13.4 GB`, 10^9 bytes each."""
    return f"{size / 1e9:.1f} GB"


def bytes_of(size: float | None) -> int | None:
    """What a number of GB, 10^9 bytes each, is in bytes; None stays that."""
    return None if size is None else int(size * 1e9)
