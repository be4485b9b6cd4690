"""Plain rounding of a whole weight, bound by memory rather than by arithmetic: each thread has its rows and its memory, and every pass is in place.

What is taken anew for each block of rows (pages of fresh memory, and NumPy's conversion from float16) costs four times the arithmetic.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.cores import cores
from graphs.quantize.rounding import Floats, Grid, Levels, round_into
from graphs.quantize.writer import ROW_BLOCK_VALUES, exact_rows, row_slices

MOST_THREADS = 16
"""Each has some 4 MB; memory is the limit long before."""


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


def round_weight(weight: NDArray[Any], name: str, grid: Grid, values: int = ROW_BLOCK_VALUES, threads: int | None = None) -> PlainWeight:
    """Round [out, in] float16 or float32 values to the nearest levels, about so many of them at a time, on all cores or so many threads.

    Raises:
        QuantizationError: a value is NaN or Inf; of several such blocks of rows the first is named.
    """
    levels, scale = np.empty(weight.shape, np.int8), np.empty((len(weight), grid.blocks(weight.shape[1])), np.float32)
    slices, own = row_slices(weight, values), local()

    def round_some(rows: slice) -> tuple[float, float]:
        if not hasattr(own, "memory"):
            own.memory = np.empty((2, slices[0].stop, weight.shape[1]), np.float32)
        exact, scratch = own.memory[:, : rows.stop - rows.start]
        exact_rows(weight, name, rows, exact, scratch)
        squares = float(np.vdot(exact, exact))
        scale[rows], error = round_into(levels[rows], exact, grid, scratch)
        return squares, error

    with ThreadPoolExecutor(threads or min(cores(), MOST_THREADS)) as pool:
        sums = list(pool.map(round_some, slices))
    return PlainWeight(levels, scale, sum(squares for squares, _ in sums), sum(error for _, error in sums))
