"""Levels of block-wise weights: how they are chosen and how they are stored.

A level is stored above the middle (128 or 8); two of four bits share a byte, the first one below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Levels = NDArray[np.int16]
BYTE_BITS = 8


@dataclass(frozen=True)
class Format:
    """How one weight is stored."""

    bits: int
    block_size: int

    @property
    def middle(self) -> int:
        """The level that stands for zero."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.block_size)


Round = Callable[[Floats, Format], tuple[Levels, Floats]]
"""Weights [rows, blocks, block] → levels around zero of the same shape and scales [rows, blocks]; plain rounding, or one that has seen data."""


def round_to_nearest(blocks: Floats, form: Format) -> tuple[Levels, Floats]:
    """Plain rounding [rows, blocks, block]. 8 bits: the largest of a block is ±127. 4 bits: it is −8, whatever its sign: no level is unused."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    exact = np.abs(largest) / (form.middle - 1) if form.bits == BYTE_BITS else -largest / form.middle
    scale: Floats = np.where(exact == 0, 1, exact).astype(np.float32)
    return to_levels(blocks, scale, form), scale


def to_levels(blocks: Floats, scale: Floats, form: Format) -> Levels:
    """The nearest levels to weights ÷ scales."""
    levels: Levels = np.clip(np.rint(blocks / scale[:, :, None]), -form.middle, form.middle - 1).astype(np.int16)
    return levels


def pack(levels: Levels, form: Format) -> NDArray[np.uint8]:
    """Levels [rows, blocks, block] around zero → bytes [rows, blocks, block · bits / 8]."""
    raised: NDArray[np.uint8] = (levels + form.middle).astype(np.uint8)
    if form.bits == BYTE_BITS:
        return raised
    halves: NDArray[np.uint8] = np.bitwise_or(raised[:, :, 0::2], np.left_shift(raised[:, :, 1::2], 4))
    return halves
