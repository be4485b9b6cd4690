"""How fast this machine is, measured in under a second: how it writes to a disk, and how it multiplies."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from artifact.errors import ArtifactError
from artifact.room import existing_folder
from engines.step_cost import Rates

BLOCK_BYTES, BLOCKS = 8 << 20, 8
SIDE, ROUNDS = 1024, 4


def measure_rates(folder: Path) -> Rates:
    """The two rates that times scale with.

    Args:
        folder: where an artifact would go; it, or what is there above it, is written to.

    Raises:
        ArtifactError: nothing can be written there.
    """
    return Rates(_disk_gb_s(existing_folder(folder)), _gflops())


def _disk_gb_s(folder: Path) -> float:
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)  # a disk may make little of zeros
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(BLOCKS):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return BLOCKS * BLOCK_BYTES / (time.perf_counter() - start) / 1e9
    except OSError as error:
        raise ArtifactError(f"{folder} can't be written to: {error.strerror}", hint="--out names another folder") from error


def _gflops() -> float:
    left = np.ones((SIDE, SIDE), np.float32)
    left @ left  # threads and caches
    start = time.perf_counter()
    for _ in range(ROUNDS):
        left @ left
    return float(2 * SIDE**3 * ROUNDS / (time.perf_counter() - start) / 1e9)
