"""How far the size of a weight, or of a part of it, is from the checkpoint's: ⟨stored, wanted⟩ ÷ ⟨wanted, wanted⟩, which rounding leaves at 1.

Rounding leaves an error of t ÷ √12 to 0.41 t a weight (t: its step; measured), so the size is known within a multiple of t ÷ ‖wanted‖.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
STEPS = 4.0
"""Of t ÷ ‖wanted‖: 10 to 14 standard errors."""
COLUMN_STEPS = 8.0
"""The same of a column: rounding that makes up for its errors leaves some that rows have in common (0.97 of ``STEPS`` measured)."""


@dataclass(frozen=True)
class Misfit:
    """What is furthest from being right: ``share`` of what is allowed, above 1 is a fault."""

    share: float
    error: float
    allowed: float
    words: str


NOTHING = Misfit(0.0, 0.0, 1.0, "")


def size_limit(step: Any, size: Any, steps: float = STEPS) -> Any:
    """What rounding may do to a size: ``step`` is t² (its mean), ``size`` is ‖wanted‖²."""
    return steps * np.sqrt(step / np.maximum(size, 1e-300))


def worst(misfits: list[Misfit]) -> Misfit:
    """The one with the largest share."""
    return max([NOTHING, *misfits], key=lambda misfit: misfit.share)


class Sizes:
    """Sums over the rows of a weight, by anything that has an index.

    Args:
        name: of one of them; `{}` is its index, that of the first is ``first``.
        count: weights that each is of.
        least: what its scales' own rounding may change.
        steps: how many may be the noise.

    Besides, a rounding to the middle of its cells takes t² ÷ 12 ÷ mean wanted² of the size itself.
    """

    def __init__(self, name: str, count: int, least: float, *, first: int = 0, steps: float = STEPS) -> None:
        self._name, self._count, self._least, self._first, self._allowed = name, count, least, first, steps
        self._along, self._size, self._steps = (np.zeros(1) for _ in range(3))

    def add(self, along: Array, size: Array, steps: Array) -> None:
        """Some of ⟨stored, wanted⟩, ‖wanted‖² and t²."""
        self._along, self._size, self._steps = self._along + along, self._size + size, self._steps + steps

    def misfit(self) -> Misfit:
        """Of the worst."""
        along, size, step = (array.ravel() for array in (self._along, self._size, self._steps / self._count))
        there = size > 0
        error = np.where(there, np.abs(along / np.where(there, size, 1) - 1), 0.0)
        allowed = size_limit(step, size, self._allowed) + step / 12 * self._count / np.maximum(size, 1e-300) + self._least
        index = int(np.argmax(error / allowed))
        name, slope = self._name.format(self._first + index), float(along[index] / max(size[index], 1e-300))
        return Misfit(float(error[index] / allowed[index]), float(error[index]), float(allowed[index]), f"{name} is multiplied by {slope:.4g}")
