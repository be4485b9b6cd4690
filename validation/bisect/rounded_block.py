"""Whether the blocks of a rounded weight are a rounding of the checkpoint's: one scale of those that rounding would give, and levels of it.

Letters: r rows, b blocks of a row, m blocks, k weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.quantize.gptq import REACH
from graphs.quantize.rounding import Grid
from validation.bisect.misfit import Misfit, size_limit

Array = NDArray[Any]
SCALE = 2.0**-10
"""A last place of float16: what storing a scale may change."""
WHOLE = 0.02
"""How far a level may be from a whole number: float32's products are a hundred times nearer."""
LEVEL = REACH + 0.5 + WHOLE


@dataclass(frozen=True)
class Blocks:
    """Judges blocks.

    Attributes:
        grid: what they were rounded to.
        room: what a scale may be off by.
    """

    grid: Grid
    room: float = SCALE

    @property
    def level(self) -> float:
        """How many levels a value may be off: one beside the nearest, and what a scale that is known less well makes of the largest."""
        return LEVEL + (self.room - SCALE) * self.grid.high

    def recovered(self, ours: Array, theirs: Array) -> tuple[Array, Array]:
        """The scales [r, b] that explain blocks [r, b, k] best, as they really are; and how far that is from a rounding: above 1 is a fault.

        Rounding that knows what an error costs has several scales to choose from; one that explains the block is enough.
        """
        scale, misfit = self.grid.scale_of(theirs, 1.0), np.full(ours.shape[:2], np.inf)
        for factor in (1.0, *self.grid.factors):
            left = misfit > 1
            if left.any():
                found, off = self._fit(ours[left], theirs[left], self.grid.scale_of(theirs, factor)[left])
                better = off < misfit[left]
                scale[left], misfit[left] = np.where(better, found, scale[left]), np.where(better, off, misfit[left])
        return scale, misfit

    def clipped(self, theirs: Array, scale: Array) -> Array:
        """Weights [r, b, k] as the ends of a scale [r, b] leave them."""
        ends = scale[:, :, None] * np.float32(self.grid.low), scale[:, :, None] * np.float32(self.grid.high)
        return np.clip(theirs, np.minimum(*ends), np.maximum(*ends))

    def describe(self, name: str, ours: Array, theirs: Array, real: float) -> Misfit:
        """What is wrong with a block [k] that no scale explains; ``real`` is the one that explains it best."""
        size = float(np.square(theirs, dtype=np.float64).sum())
        if size == 0:
            return Misfit(np.inf, np.inf, 0.0, f"{name} is not zero, as the checkpoint's is")
        scale = min(
            (float(self.grid.scale_of(theirs[None, None], factor)[0, 0]) for factor in (1.0, *self.grid.factors)), key=lambda one: abs(one - real)
        )
        slope, ratio, levels = float(np.dot(ours.astype(np.float64), theirs)) / size, real / scale, ours / real
        off = float(np.abs(levels - self._nearest(theirs, real)).max())
        found = [
            _misfit(slope - 1, size_limit(scale**2, size) + self.room, f"{name} is multiplied by {slope:.4g}"),
            _misfit(off, self.level, f"{name} has a value that is {off:.2g} levels off"),
            _misfit(ratio - 1, self.room, f"{name} has a scale that is {ratio:.4g} × what rounding it gives"),
            _misfit(float(np.abs(levels - np.rint(levels)).max()), WHOLE, f"{name} holds values that are no whole levels of its scale"),
        ]
        return next((misfit for misfit in found if misfit.share > 1), found[-1])

    def _fit(self, ours: Array, theirs: Array, scale: Array) -> tuple[Array, Array]:
        """Of blocks [m, k] and one scale [m] each: the scale as its largest level says it really is, and the misfit."""
        real, level = _real_scale(ours, scale)
        levels = ours / real[:, None]
        beside = np.abs(levels - self._nearest(theirs, real[:, None])).max(axis=1)
        whole = np.abs(levels - np.rint(levels)).max(axis=1)
        misfit = np.max((np.abs(real / scale - 1) / self.room, whole / WHOLE, beside / self.level), axis=0)
        misfit = np.where(level > max(self.grid.high, -self.grid.low), np.inf, misfit)
        largest = np.abs(theirs).max(axis=1)
        as_it_was = np.abs(ours - theirs).max(axis=1) / np.maximum(self.room * largest, 1e-30)  # levels of the checkpoint have scales of its own
        return real, np.where(largest > 0, np.minimum(misfit, as_it_was), np.where(np.any(ours, axis=1), np.inf, 0.0))

    def _nearest(self, theirs: Array, scale: Any) -> Array:
        levels: Array = np.clip(theirs / scale, self.grid.low, self.grid.high)
        return levels


def _real_scale(ours: Array, scale: Array) -> tuple[Array, Array]:
    """What the largest value is a whole number of, and that number [m]."""
    largest = np.abs(ours).max(axis=1)
    level = np.rint(largest / np.abs(scale))
    return np.where(level > 0, np.copysign(largest / np.maximum(level, 1), scale), scale), level


def _misfit(error: float, allowed: float, words: str) -> Misfit:
    return Misfit(float(abs(error) / allowed), float(abs(error)), float(allowed), words)
