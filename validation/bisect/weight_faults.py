"""Whether a weight that a graph computes with is the checkpoint's, as far as the form in which it is stored can hold it.

    float     the checkpoint's own, rounded once to the dtype: no difference at all
    rounded   each row within four levels of the checkpoint's (root mean square; plain rounding takes 0.29, rounding by what calibration saw up to
              1.02 on SmolLM2), and of its size: a row is not multiplied by anything
    smoothed  int8-smoothquant moves factors from column to column and from row to row of other weights: only the pattern is compared
Letters: n values of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.bisect.weights import Weight

Array = NDArray[Any]
LEVELS = 4.0
SLOPE_SIGMAS, LEAST_SLOPE = 8.0, 2.0**-10
"""A row's size may differ by so many standard errors of its rounding, and by one float16 rounding of its scale in any case."""
SMOOTHED = 0.05
"""Of a smoothed weight's pattern, by column: share that is not the checkpoint's; int8 leaves 0.01."""


@dataclass(frozen=True)
class WeightFault:
    """A weight beside the checkpoint's; ``share`` of what its form explains, above 1 is a fault."""

    name: str
    weight: Weight
    share: float
    error: float
    allowed: float
    words: str


def compare_weight(name: str, weight: Weight, exact: Array, dtype: str, *, smoothed: bool) -> WeightFault:
    """Compare; ``exact`` is the checkpoint's in float32, ``dtype`` numpy's name of the artifact's."""
    if weight.array.shape != exact.shape:
        return WeightFault(name, weight, np.inf, np.inf, 0.0, f"its shape is {list(weight.array.shape)}, the checkpoint's {list(exact.shape)}")
    if not np.isfinite(weight.array).all():
        first = np.argwhere(~np.isfinite(weight.array))[0].tolist()
        return WeightFault(name, weight, np.inf, np.inf, 0.0, f"it is not finite, first at {first}")
    compare: Callable[[str, Weight, Array], WeightFault] = _rounded
    if smoothed:
        compare = _pattern
    elif weight.levels is None:
        exact, compare = exact.astype(dtype).astype(np.float32), _same
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return compare(name, weight, exact)


def _same(name: str, weight: Weight, exact: Array) -> WeightFault:
    different = ~(weight.array == exact)
    count = int(different.sum())
    error = _share(float(np.abs(weight.array - exact).max()), float(np.sqrt(np.mean(exact**2)))) if count else 0.0
    first = np.argwhere(different)[0].tolist() if count else []
    words = f"{count:,} of {exact.size:,} values are not the checkpoint's, the first at {first}" if count else "every value is the checkpoint's"
    return WeightFault(name, weight, np.inf if count else 0.0, error, 0.0, words)


def _rounded(name: str, weight: Weight, exact: Array) -> WeightFault:
    assert weight.levels is not None
    size = np.linalg.norm(exact, axis=1)
    left = np.linalg.norm(weight.array - exact, axis=1) / np.maximum(size, 1e-30)  # [out], relative
    level = np.abs(exact).max(axis=1) / weight.levels * np.sqrt(exact.shape[1]) / np.maximum(size, 1e-30)
    by_level = left / np.maximum(LEVELS * level, 1e-30)
    slope = np.abs((weight.array * exact).sum(axis=1) / np.maximum(size**2, 1e-30) - 1)
    allowed = np.maximum(SLOPE_SIGMAS * level / np.sqrt(exact.shape[1]), LEAST_SLOPE)
    shares = np.where(size > 0, np.maximum(by_level, slope / allowed), 0.0)
    row = int(np.argmax(np.where(np.isnan(shares), np.inf, shares)))
    is_slope = slope[row] / allowed[row] > by_level[row]
    error, limit = (slope[row], allowed[row]) if is_slope else (left[row], LEVELS * level[row])
    words = f"row {row} is " + (f"multiplied by {1 + _signed(weight.array[row], exact[row]):.4g}" if is_slope else f"{by_level[row]:.2g} levels off")
    return WeightFault(name, weight, float(shares[row]) if np.isfinite(shares[row]) else np.inf, float(error), float(limit), words)


def _pattern(name: str, weight: Weight, exact: Array) -> WeightFault:
    ours, theirs = np.atleast_2d(weight.array), np.atleast_2d(exact)
    if weight.levels is None:
        return WeightFault(name, weight, 0.0, 0.0, SMOOTHED, "smoothing may have changed it: not compared")
    alike = (ours * theirs).sum(axis=0) / np.maximum(np.linalg.norm(ours, axis=0) * np.linalg.norm(theirs, axis=0), 1e-30)
    error = float(1 - np.median(alike))
    return WeightFault(name, weight, error / SMOOTHED, error, SMOOTHED, f"its columns are {1 - error:.3f} like the checkpoint's")


def _signed(ours: Array, theirs: Array) -> float:
    return float((ours * theirs).sum() / max(float((theirs**2).sum()), 1e-30)) - 1


def _share(value: float, size: float) -> float:
    return value / size if size else float("inf")
