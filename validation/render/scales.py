"""Axes of a chart: from values to px, round ticks, labels moved apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

LOGARITHMIC_FROM = 8.0
"""Largest ÷ smallest positive value from which an axis is logarithmic: below it, small lines stay apart on a linear one."""

STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Scale:
    """A value axis from ``low`` to ``high``; on a logarithmic one, zero and below lie on its lower edge."""

    low: float
    high: float
    logarithmic: bool

    def at(self, value: float, edges: tuple[float, float]) -> float:
        """Position of a value between the px of ``low`` and of ``high``, never outside."""
        low, high, value = (self._unit(item) for item in (self.low, self.high, value))
        fraction = min(1.0, max(0.0, (value - low) / (high - low)))
        return edges[0] + fraction * (edges[1] - edges[0])

    def ticks(self) -> list[float]:
        """Three to eight round values of the axis."""
        if not self.logarithmic:
            step = _round_step((self.high - self.low) / 5)
            return [i * step for i in range(ceil(self.low / step), floor(self.high / step * (1 + 1e-9)) + 1)]
        decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        for steps in (STEPS, (1.0, 3.0), (1.0,)):
            found = [step * 10.0**decade for decade in decades for step in steps if self.low <= step * 10.0**decade <= self.high]
            if len(found) <= 8:  # more lines than this are a pattern, not an axis
                return found
        return found[:: ceil(len(found) / 8)]

    def _unit(self, value: float) -> float:
        return log10(max(value, self.low)) if self.logarithmic else value


def scale_for(values: Sequence[float]) -> Scale:
    """An axis that holds all values: from zero, or logarithmic where the positive ones span more than a factor 20."""
    positive = [value for value in values if value > 0]
    if not positive:
        return Scale(0.0, 1.0, logarithmic=False)
    if max(positive) / min(positive) > LOGARITHMIC_FROM:
        return Scale(min(positive) / 1.4, max(positive) * 1.4, logarithmic=True)
    return Scale(0.0, max(positive) * 1.1, logarithmic=False)


def index_ticks(length: int, first: int, most: int) -> list[int]:
    """At most about ``most`` round indices of ``first … first + length - 1``; the first is always named."""
    step = max(1, int(_round_step(length / most)))
    rounds = [index for index in range(first, first + length) if index % step == 0]
    return rounds if first in rounds or not length else [first, *(index for index in rounds if index - first > step / 2)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to at least ``gap``, in order, within ``low … high`` as long as they fit."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    below = low - gap
    for index in order:
        below = moved[index] = max(places[index], below + gap)
    above = high + gap
    for index in reversed(order):
        above = moved[index] = min(moved[index], above - gap)
    return moved


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that is not below ``rough``."""
    decade = 10.0 ** floor(log10(rough)) if rough > 0 else 1.0
    return next(step * decade for step in (*STEPS, 10.0) if step * decade >= rough * (1 - 1e-9)) if rough > 0 else 1.0
