"""Whether a weight that a graph computes with is the checkpoint's, as far as the form in which it is stored can hold it.

float     the checkpoint's own, rounded once to the dtype: no difference at all
rounded   a rounding of the checkpoint's (rounded_weight.py)
smoothed  int8-smoothquant moves factors between linears: the same of the weight with the factors that others ask for
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.bisect.misfit import NOTHING, Misfit
from validation.bisect.rounded_block import SCALE
from validation.bisect.rounded_weight import rounded_misfit
from validation.bisect.smoothed import ROOM, Factors
from validation.bisect.weights import Weight

Array = NDArray[Any]


@dataclass(frozen=True)
class WeightFault:
    """A weight beside the checkpoint's; ``share`` of what its form explains, above 1 is a fault."""

    name: str
    weight: Weight
    share: float
    error: float
    allowed: float
    words: str


def compare_weight(name: str, weight: Weight, exact: Array, factors: Factors | None = None) -> WeightFault:
    """Compare.

    Args:
        name: the checkpoint's.
        weight: as the graph has it.
        exact: the checkpoint's, rounded to the artifact's dtype, in float32.
        factors: what smoothing has moved into it; None where nothing was.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        misfit = _misfit(weight, exact, factors)
    return WeightFault(name, weight, misfit.share, misfit.error, misfit.allowed, misfit.words)


def _misfit(weight: Weight, exact: Array, factors: Factors | None) -> Misfit:
    if weight.array.shape != exact.shape:
        return Misfit(np.inf, np.inf, 0.0, f"its shape is {list(weight.array.shape)}, the checkpoint's {list(exact.shape)}")
    if not np.isfinite(weight.array).all():
        first = np.argwhere(~np.isfinite(weight.array))[0].tolist()
        return Misfit(np.inf, np.inf, 0.0, f"it is not finite, first at {first}")
    if weight.grid is None:
        return _same(weight.array, exact) if factors is None or factors.nothing else _near(weight.array, factors.of(exact))
    if factors is None:
        return rounded_misfit(weight.array, exact, weight.grid)
    found = rounded_misfit(weight.array, factors.of(exact), weight.grid, room=ROOM)
    words = found.words if factors.columns is None else f"{found.words}; its columns must undo what {factors.source} was divided by"
    return replace(found, words=words)


def _same(ours: Array, exact: Array) -> Misfit:
    different = ~(ours == exact)
    count = int(different.sum())
    if not count:
        return NOTHING
    size = float(np.sqrt(np.mean(exact**2)))
    error = float(np.abs(ours - exact).max()) / size if size else float("inf")
    first = np.argwhere(different)[0].tolist()
    return Misfit(np.inf, error, 0.0, f"{count:,} of {exact.size:,} values are not the checkpoint's, the first at {first}")


def _near(ours: Array, wanted: Array) -> Misfit:
    """Of a float that was multiplied and rounded: two last places of float16, and what lies below its smallest."""
    allowed = 2 * SCALE * np.abs(wanted) + np.float32(2.0**-24)
    shares = np.abs(ours - wanted) / allowed
    index = np.unravel_index(int(np.argmax(shares)), shares.shape)
    error = float(np.abs(ours - wanted)[index] / max(float(np.abs(wanted[index])), 2.0**-24))
    return Misfit(float(shares[index]), error, 2 * SCALE, f"the value at {[int(one) for one in index]} is not the checkpoint's with its factors")
