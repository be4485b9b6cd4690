"""What a site's smoothing is tried on: the parts of the text, each judged by what the others reach, and the error of the outputs there.

Letters: n rows, in and out channels, o some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from graphs.quantize.islands import HIGHEST, LOWEST
from graphs.quantize.statistics import SiteStatistics

Floats = NDArray[np.float32]
ROWS, FIRST_ROWS, OUTPUTS = 192, 8, 192
"""How many sampled rows, rows at position 0 and outputs an error is measured on, of each part."""
LEAST = 1e-6


class Trial:
    """Rows of one site and what they should give."""

    def __init__(self, weight: Floats, samples: Floats, first_rows: Floats) -> None:
        rows, first = some_of(samples, ROWS), some_of(first_rows, FIRST_ROWS)
        self._x = np.concatenate([rows, first])  # [n, in], the rows at position 0 last
        self._wanted = self._x @ weight.T  # [n, out]
        self._rows = len(rows)
        squares = np.square(self._wanted).sum(axis=1, dtype=np.float64)
        self._square = _mean(squares[: self._rows]) or LEAST
        self._first_square = max(_mean(squares[self._rows :]), self._square)

    def errors(self, vector: Floats, scales: Sequence[float], rounded: Floats) -> Iterator[NDArray[np.float64]]:
        """With each scale, squared errors of the output ÷ its square: on rows, and at position 0."""
        smoothed = self._x / vector
        for scale in scales:
            levels = smoothed * np.float32(1 / scale)
            np.clip(np.rint(levels, out=levels), LOWEST, HIGHEST, out=levels)
            error = levels @ rounded.T
            error *= np.float32(scale)
            error -= self._wanted
            squares = np.einsum("no,no->n", error, error, dtype=np.float64)
            yield np.array([_mean(squares[: self._rows]) / self._square, _mean(squares[self._rows :]) / self._first_square])


def folds(measured: SiteStatistics) -> list[tuple[Floats, Floats]]:
    """Largest values [in] of all parts of the text but one, with position 0, and the sampled rows of that one [n, in]; so for each part.

    Where the text has one part, or none was told, the halves of the rows stand for two: they lie in the order of the text.
    """
    at_first = np.abs(measured.first).max(axis=0, initial=0.0)
    largest, counts = measured.part_absmax, measured.part_samples
    if largest is None or len(counts) < 2:
        halves = np.array_split(measured.samples, 2) if len(measured.samples) > 1 else [measured.samples, measured.samples]
        largest, counts = np.stack([np.abs(half).max(axis=0, initial=0.0) for half in halves]), tuple(map(len, halves))
        rows = halves
    else:
        rows = np.split(measured.samples, np.cumsum(counts)[:-1])
    others = [np.maximum(np.delete(largest, part, axis=0).max(axis=0), at_first) for part in range(len(counts))]
    return [(made_from, tried_on) for made_from, tried_on in zip(others, rows, strict=True) if len(tried_on)]


def some_of(rows: Floats, count: int) -> Floats:
    """At most ``count`` rows, spread over all."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def _mean(squares: NDArray[np.float64]) -> float:
    return float(squares.mean()) if len(squares) else 0.0
