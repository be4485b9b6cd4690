"""Rounds the weight of one linear, some rows at a time, and measures what that costs: plainly, or driven by what calibration saw of its input.

Errors are root mean squares, relative to what is rounded: of the weights, and of the linear's outputs on sampled inputs. Those of outputs are
measured on rows of the samples, without damping: plain rounding's beside that of what was chosen.
Letters: r rows at a time, n samples.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.layout import layer_of
from graphs.quantize.gptq import REACH, TINY, Feedback, make_feedback, round_in_order
from graphs.quantize.linears import site_of
from graphs.quantize.plain import round_weight
from graphs.quantize.rounding import Floats, Grid, Levels, round_plainly, search_scale
from graphs.quantize.statistics import SiteStatistics, Statistics
from graphs.quantize.writer import exact_rows, row_slices

METHODS = {False: "plain", True: "gptq"}
"""By whether there are statistics."""
FIRST = 0.01
"""What position 0 weighs, where all others together weigh 1 (docs/adr/014)."""
DAMPING, DAMPING_MEAN = 0.3, 0.03
"""Damping of a channel: this much of its own mean square, position 0 with its weight, and of the mean of all (docs/adr/014)."""
DRIVEN_VALUES = 1 << 22
"""Weights at a time where products are behind them."""
MEASURED_SAMPLES = 256
"""Sampled inputs, spread over all, on which outputs are compared."""


@dataclass
class Errors:
    """Sums of squares of one linear: weights and outputs, and the errors of both."""

    weight: float = 0.0
    weight_error: float = 0.0
    output: float = 0.0
    output_error: float = 0.0
    plain_output_error: float = 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    def report(self) -> dict[str, float]:
        """weight_rms; with calibration also output_rms and plain_output_rms."""
        found = {"weight_rms": _rms(self.weight_error, self.weight)}
        if self.output:
            found |= {"output_rms": _rms(self.output_error, self.output), "plain_output_rms": _rms(self.plain_output_error, self.output)}
        return found


def _rms(error: float, total: float) -> float:
    return sqrt(error / total) if total else 0.0


def rounding_report(rounder: Rounder) -> dict[str, Any]:
    """What the report of a scheme says of its rounding: method, reach, weight_error, output_error (calibrated), rounded (each linear's errors)."""
    found = {name: errors.report() for name, errors in rounder.errors.items()}
    return {
        "method": METHODS[rounder.statistics is not None],
        "reach": REACH if rounder.statistics is not None else 0,
        "weight_error": _summary(found, "weight_rms"),
        **({"output_error": _output_summary(found)} if rounder.statistics is not None else {}),
        "rounded": [{"name": name, **{key: round(value, 6) for key, value in errors.items()}} for name, errors in found.items()],
    }


def _summary(found: dict[str, dict[str, float]], key: str) -> dict[str, Any]:
    """The worst linear, and the mean of all that have the key; None where none has: every sampled output is 0."""
    values = {name: errors[key] for name, errors in found.items() if key in errors}
    if not values:
        return {"worst": None, "worst_rms": None, "mean_rms": None}
    worst = max(values, key=lambda name: values[name])
    return {"worst": worst, "worst_rms": values[worst], "mean_rms": sum(values.values()) / len(values)}


def _output_summary(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"plain": _summary(found, "plain_output_rms"), "chosen": _summary(found, "output_rms")}


@dataclass(frozen=True)
class Input:
    """What rounding knows of the input of a linear: the feedback, and some samples [n, in] to measure on."""

    feedback: Feedback
    samples: Floats


@dataclass
class Rounder:
    """Rounds linears of one model; the input that was used last is kept, for several linears may read it.

    Attributes:
        statistics: of the model's activations; None rounds plainly.
        errors: name of a linear → what rounding it cost.
    """

    statistics: Statistics | None = None
    errors: dict[str, Errors] = field(default_factory=dict)
    _last: tuple[str, Input | None] = ("", None)

    def round(self, weight: NDArray[Any], name: str, grid: Grid) -> tuple[Levels, Floats]:
        """Round a weight.

        Args:
            weight: [out, in] float16 or float32, mapped or in memory.
            name: of the linear, its module path.
            grid: what it is rounded to.

        Returns:
            Levels [out, in] int8 and scales [out, b] float32.

        Raises:
            QuantizationError: the weight is not finite, or the statistics are another model's.
        """
        seen = self.input_of(name, weight.shape[1])
        if seen is None:
            plain = round_weight(weight, name, grid)
            self.errors[name] = Errors(plain.squares, plain.error)
            return plain.levels, plain.scale
        levels, scale = np.empty(weight.shape, np.int8), np.empty((len(weight), grid.blocks(weight.shape[1])), np.float32)
        errors = Errors()
        for rows in row_slices(weight, DRIVEN_VALUES):  # the products have threads of their own
            exact = exact_rows(weight, name, rows)
            nearest = round_plainly(exact, grid)
            levels[rows], scale[rows] = chosen = round_by(seen.feedback, exact, grid, nearest)
            errors += _measured(exact, grid, chosen, nearest, seen)
        self.errors[name] = errors
        return levels, scale

    def input_of(self, name: str, columns: int) -> Input | None:
        """What is known of a linear's input; None where nothing was measured."""
        site = site_of(name)
        if self._last[0] != site:
            found = None if self.statistics is None or layer_of(site) is None else self.statistics.of(site)
            if found is not None and found.samples.shape[1] != columns:
                message = f"{name} reads {columns} channels, the statistics of {site} have {found.samples.shape[1]}: they are of another model"
                raise QuantizationError(message, hint="remove calibration*.safetensors; quantize measures anew")
            self._last = site, None if found is None else prepare(found)
        return self._last[1]


def prepare(site: SiteStatistics) -> Input:
    """What the rounding of a linear needs of its input's statistics.

    Position 0 is weighed for itself: its activations can be thousands of times the others', and every later token attends to it.
    """
    first = site.first * np.float32(sqrt(FIRST / max(len(site.first), 1)))
    energy = site.mean_square + np.square(first).sum(axis=0)
    samples = np.concatenate([site.samples / np.float32(sqrt(max(len(site.samples), 1))), first])
    damping = DAMPING * energy + DAMPING_MEAN * max(float(site.mean_square.mean()), TINY)
    step = max(1, len(site.samples) // MEASURED_SAMPLES)
    return Input(make_feedback(samples, damping.astype(np.float32)), site.samples[::step])


def round_by(feedback: Feedback, exact: Floats, grid: Grid, plain: tuple[Levels, Floats]) -> tuple[Levels, Floats]:
    """GPTQ's levels [r, in] and scales [r, b] of some rows where they are better than plain ones by its own objective, else those."""
    scale = search_scale(exact, grid, feedback.importance) if grid.factors else plain[1]
    weight = np.ascontiguousarray(exact.T)
    spread = np.broadcast_to(np.ascontiguousarray(grid.spread(scale, exact.shape[1]).T), weight.shape)
    levels, residual = round_in_order(weight, spread, grid.low, grid.high, feedback)
    before = feedback.objective(-_error(exact, grid, *plain).T)
    better = (feedback.objective(weight - levels * spread, residual) < before)[:, None]
    return np.where(better, levels.T, plain[0]).astype(np.int8), np.where(better, scale, plain[1])


def _measured(exact: Floats, grid: Grid, chosen: tuple[Levels, Floats], plain: tuple[Levels, Floats], seen: Input) -> Errors:
    """What some rows [r, in] cost as they were rounded, and on sampled inputs, beside plain rounding."""
    error = _error(exact, grid, *chosen)
    outputs = (exact.T, error.T, _error(exact, grid, *plain).T)
    return Errors(_squares(exact), _squares(error), *(_squares(seen.samples @ of_weight) for of_weight in outputs))


def _error(exact: Floats, grid: Grid, levels: Levels, scale: Floats) -> Floats:
    error: Floats = levels * grid.spread(scale, exact.shape[1])
    error -= exact
    return error


def _squares(values: Floats) -> float:
    return float(np.vdot(values, values))
