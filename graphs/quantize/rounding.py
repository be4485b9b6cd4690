"""Levels and scales of weights: which there are, how a scale is chosen, plain rounding, and how blocks are stored.

Letters: r rows of a weight at a time, b blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.ahead import ahead

Floats = NDArray[np.float32]
Levels = NDArray[np.int8]
BYTE_BITS = 8
TURNED_ROWS, TURNED_COLUMNS, CACHE_LINE = 256, 1024, 64
INT8, INT4 = (-127, 127), (-8, 7)
"""Lowest and highest level; of eight bits symmetric, so that a weight and its negative quantise alike. The largest of a scale has the highest."""
FACTORS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""By which the scale of a block of four bits may be smaller: clipping its largest weight can pay."""


@dataclass(frozen=True)
class Grid:
    """The levels and scales that a stored form has.

    Attributes:
        low, high: levels.
        block_size: columns that share a scale; the last block of a row may be filled up with zeros.
        scale_of: (weights [r, b, block], a factor) → scales [r, b] in float32, never zero, exactly as they will be stored. With factor 1 the largest
            weight of a block is not clipped.
        factors: by which a scale may be smaller, where it is known what a weight's error costs.
    """

    low: int
    high: int
    block_size: int
    scale_of: Callable[[Floats, float], Floats]
    factors: tuple[float, ...] = ()

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.block_size)

    def blocked(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows [r, in] → [r, b, block], filled up with zeros."""
        columns = rows.shape[1]
        if self.block_size == columns:
            return rows[:, None]
        missing = self.blocks(columns) * self.block_size - columns
        padded = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
        return padded.reshape(len(rows), -1, self.block_size)

    def spread(self, scale: Floats, columns: int) -> Floats:
        """Scales [r, b] → one for every weight [r, in]; [r, 1] where a row has one."""
        return scale if scale.shape[1] == 1 else np.repeat(scale, self.block_size, axis=1)[:, :columns]


def round_plainly(rows: Floats, grid: Grid) -> tuple[Levels, Floats]:
    """The nearest level to each weight [r, in]: levels [r, in] and scales [r, b]."""
    scale = grid.scale_of(grid.blocked(rows), 1.0)
    return nearest(rows, grid.spread(scale, rows.shape[1]), grid), scale


def round_into(levels: Levels, rows: Floats, grid: Grid, scratch: Floats) -> tuple[Floats, float]:
    """As ``round_plainly``, in place: levels are written, rows and scratch (all [r, in]) used up.

    Returns:
        Scales [r, b], and Σ error² of the weights: of quotients, before they are multiplied by their scales, for that takes two passes less.
    """
    scale = grid.scale_of(grid.blocked(rows), 1.0)
    np.divide(rows, grid.spread(scale, rows.shape[1]), out=rows)
    whole = _whole(rows, grid, scratch)
    np.copyto(levels, whole, casting="unsafe")
    error = grid.blocked(np.subtract(rows, whole, out=rows))
    return scale, float(np.vdot(np.square(scale), np.vecdot(error, error)))


def search_scale(rows: Floats, grid: Grid, importance: Floats) -> Floats:
    """Scales [r, b] of the least Σ importance · error², rounded to the nearest level; ``importance`` [in] is what an error of a channel costs."""
    blocks, cost = grid.blocked(rows), grid.blocked(importance[None])
    best = grid.scale_of(blocks, 1.0)
    least = _cost(blocks, best, grid, cost)
    for factor in grid.factors:
        scale = grid.scale_of(blocks, factor)
        found = _cost(blocks, scale, grid, cost)
        best, least = np.where(found < least, scale, best), np.minimum(found, least)
    return best


def _cost(blocks: Floats, scale: Floats, grid: Grid, importance: Floats) -> Floats:
    error = nearest(blocks, scale[:, :, None], grid) * scale[:, :, None] - blocks
    found: Floats = np.einsum("rbk,rbk,xbk->rb", error, error, importance)
    return found


def nearest(rows: Floats, scale: Floats, grid: Grid) -> Levels:
    """The nearest levels to weights ÷ scales, of shapes that fit."""
    exact = rows / scale
    return _whole(exact, grid, exact).astype(np.int8)


def _whole(exact: Floats, grid: Grid, out: Floats) -> Floats:
    """Quotients to whole levels, into ``out``."""
    np.clip(np.rint(exact, out=out), grid.low, grid.high, out=out)
    return out


def largest_over(divisor: int, dtype: np.dtype[Any]) -> Callable[[Floats, float], Floats]:
    """Scales by which the largest |weight| of a block is the level ``divisor``, rounded up to a dtype: it is never clipped. Zeros have scale 1."""

    def scale_of(blocks: Floats, factor: float) -> Floats:
        largest = np.maximum(blocks.max(axis=2, initial=0.0), -blocks.min(axis=2, initial=0.0))
        return rounded_up(np.where(largest > 0, largest * np.float32(factor) / divisor, 1).astype(np.float32), dtype)

    return scale_of


def rounded_up(exact: Floats, dtype: np.dtype[Any]) -> Floats:
    """The next number of a dtype that is not below, in float32."""
    stored = exact.astype(dtype)
    return np.where(stored.astype(np.float32) < exact, np.nextafter(stored, dtype.type(np.inf)), stored).astype(np.float32)


@dataclass(frozen=True)
class Format:
    """How ONNX Runtime's MatMulNBits stores one weight: a level above the middle (128 or 8); two of four bits share a byte, the first one below."""

    bits: int
    block_size: int

    @property
    def middle(self) -> int:
        """The level that stands for zero."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.block_size)

    def grid(self, dtype: np.dtype[Any]) -> Grid:
        """8 bits: the largest of a block is ±127. 4 bits: it is −8, whatever its sign: no level is unused."""

        def scale_of(blocks: Floats, factor: float) -> Floats:
            largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
            exact = np.abs(largest) / (self.middle - 1) if self.bits == BYTE_BITS else -largest / self.middle
            stored: Floats = (exact * np.float32(factor)).astype(dtype).astype(np.float32)
            return np.where(stored == 0, 1, stored).astype(np.float32)

        return Grid(-self.middle, self.middle - 1, self.block_size, scale_of, () if self.bits == BYTE_BITS else FACTORS)


def pack(levels: NDArray[Any], form: Format) -> NDArray[np.uint8]:
    """Levels [r, b, block] around zero → bytes [r, b, block · bits / 8]."""
    raised: NDArray[np.uint8] = (levels.astype(np.int16) + form.middle).astype(np.uint8)
    return raised if form.bits == BYTE_BITS else nibbles(raised)


def nibbles(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Two levels of four bits a byte, along the last axis: the first one below."""
    low, high = np.bitwise_and(levels[..., 0::2].astype(np.uint8), np.uint8(15)), levels[..., 1::2].astype(np.uint8)
    halves: NDArray[np.uint8] = np.bitwise_or(low, np.left_shift(high, np.uint8(4)))
    return halves


def turned(levels: Levels) -> Iterator[Levels]:
    """Levels [out, in] → [in, out] in memory order, some of its rows at a time."""
    starts = range(0, levels.shape[1], TURNED_COLUMNS)
    return ahead(lambda start: _turned(levels[:, start : start + TURNED_COLUMNS]), starts)


def _turned(levels: Levels) -> Levels:
    """Some rows at a time go through a buffer whose rows are a cache line longer.

    Rows that are a power of two apart would fall on each other in the cache, and the copy take four times as long.
    """
    rows, columns = levels.shape
    found = np.empty((columns, rows), np.int8)
    buffer = np.empty((TURNED_ROWS, columns + CACHE_LINE), np.int8)[:, :columns]
    for start in range(0, rows, TURNED_ROWS):
        some = levels[start : start + TURNED_ROWS]
        buffer[: len(some)] = some
        found[:, start : start + TURNED_ROWS] = buffer[: len(some)].T
    return found
