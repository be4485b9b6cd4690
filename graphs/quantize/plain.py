"""Plain rounding of a whole weight, bound by memory rather than by arithmetic: each thread has its rows and its memory, and every pass is in place.

What is taken anew for each block of rows (pages of fresh memory, and NumPy's conversion from float16) costs four times the arithmetic.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.quantize.rounding import Floats, Grid, Levels, round_into
from graphs.quantize.writer import ROW_BLOCK_VALUES, exact_rows, row_slices


@dataclass(frozen=True)
class PlainWeight:
    """A weight, rounded.

    Attributes:
        levels: [out, in].
        scale: [out, b].
        squares, error: Σ weight² and Σ error².
    """

    levels: Levels
    scale: Floats
    squares: float
    error: float


def round_weight(weight: NDArray[Any], name: str, grid: Grid, values: int = ROW_BLOCK_VALUES) -> PlainWeight:
    """Round [out, in] float16 or float32 values to the nearest levels, about so many of them at a time.

    Raises:
        QuantizationError: a value is NaN or Inf.
    """
    levels, scale = np.empty(weight.shape, np.int8), np.empty((len(weight), grid.blocks(weight.shape[1])), np.float32)
    slices, threads = row_slices(weight, values), len(os.sched_getaffinity(0))

    def round_some(some: list[slice]) -> tuple[float, float]:
        squares = error = 0.0
        memory = np.empty((2, some[0].stop - some[0].start, weight.shape[1]), np.float32)
        for rows in some:
            exact, scratch = memory[:, : rows.stop - rows.start]
            exact_rows(weight, name, rows, exact, scratch)
            squares += float(np.vdot(exact, exact))
            scale[rows], cost = round_into(levels[rows], exact, grid, scratch)
            error += cost
        return squares, error

    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(round_some, (slices[first::threads] for first in range(min(threads, len(slices))))))
    return PlainWeight(levels, scale, *map(sum, zip(*sums, strict=True)))
