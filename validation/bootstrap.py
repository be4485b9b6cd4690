"""How far a mean over tokens would move on other tokens of the same kind: blocks of neighbours drawn with replacement, each text by itself.

Tokens that stand together are hard together, so their errors are alike, and drawn one by one they would promise a precision that is not there.
All draws come from one seed: two forms of a model are drawn at the same tokens, and what is of the text cancels in their difference.
Source: Carlstein 1986 (blocks that don't overlap); Efron and Tibshirani 1993, §13.3 (percentiles).
Letters: n tokens of all texts, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS, SEED = 2000, 0
BLOCK, LEAST_BLOCKS, MOST_BLOCKS = 32, 8, 512
"""Tokens of a block, unless a text would have fewer or more blocks than these; why 32: docs/adr/017."""
LEVEL = 0.95
INSIDE, BEYOND = "inside noise", "beyond noise"
"""What a difference is called whose interval holds zero, and one whose does not."""


class Resampling:
    """The draws of some texts, made once.

    Args:
        lengths: tokens of each text, in the order in which values are given.
        block: tokens of a block; None chooses.
    """

    def __init__(self, lengths: Sequence[int], *, block: int | None = None, draws: int = DRAWS, seed: int = SEED) -> None:
        random = np.random.default_rng(seed)
        self._ends = np.cumsum([0, *lengths])
        self._texts = [_draw(length, block or _block(length), draws, random) for length in lengths]

    def means(self, values: Floats, text: int | None = None) -> Floats:
        """The mean of [n] values in every draw, [D]; of all texts together, or of one. NaN stays NaN."""
        chosen = range(len(self._texts)) if text is None else [text]
        parts = [(*self._texts[index], values[self.slice(index)]) for index in chosen]
        sums = [drawn @ np.add.reduceat(own, starts) for drawn, starts, _, own in parts]
        counts = [drawn @ sizes for drawn, _, sizes, _ in parts]
        return np.asarray(np.sum(sums, axis=0) / np.sum(counts, axis=0))

    def slice(self, text: int | None) -> slice:
        """Where a text's tokens stand among all; None is all."""
        return slice(None) if text is None else slice(int(self._ends[text]), int(self._ends[text + 1]))


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95 % of some draws."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _block(length: int) -> int:
    return max(1, -(-length // MOST_BLOCKS), min(BLOCK, length // LEAST_BLOCKS))


def _draw(length: int, block: int, draws: int, random: np.random.Generator) -> tuple[Floats, NDArray[np.int64], Floats]:
    """How often each block is in each draw [D, blocks], where blocks start, and their tokens."""
    starts = np.arange(0, length, block, dtype=np.int64)
    sizes = np.diff(np.append(starts, length)).astype(np.float64)
    drawn = random.multinomial(len(starts), np.full(len(starts), 1 / len(starts)), size=draws).astype(np.float64)
    return drawn, starts, sizes
