"""What moves outliers from inputs into weights, and by which static scale inputs are rounded: searched site by site (SmoothQuant).

    s = absmax(x)^α ÷ absmax(w)^(1−α)        x ÷ s is rounded by one scale, headroom · largest |x ÷ s| ÷ 127, and w · s by output channel

α and the headroom are those with the least error of the site's output on text that did not take part: s and scale are made from the largest values of
all parts of the text but one, the error is measured on sampled rows of that one, and so for each part. What is chosen is then made from all parts.
On the rows that a scale was made from, clipping always seems to pay; and a scale from the sampled rows alone, a quarter of all, clips what one
from all of them does not: it would be judged by an error that it will not make (docs/adr/015).
The rows at position 0 are always in the range, and count as much as all others together: their massive activations are what later tokens attend to.
Errors are of some of the outputs, which are as good as all to compare by.
Letters: n rows, in and out channels.
Source: arXiv:2211.10438 §4; docs/adr/015
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.progress import Progress, silent
from graphs.quantize.int8 import round_plainly_by_row
from graphs.quantize.islands import HIGHEST
from graphs.quantize.smoothing_trial import LEAST, OUTPUTS, Trial, folds, some_of
from graphs.quantize.statistics import SiteStatistics, Statistics

Floats = NDArray[np.float32]
Tie = Callable[[Floats], Floats]
"""Channels that must share a factor get the largest of theirs."""
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
HEADROOMS = (1.0, 1.15, 1.3, 1.5)
PLAIN = (1.0,)
"""Headroom where nothing is moved."""
LARGEST_FACTOR = 4096.0
"""A factor is at most so many times the geometric mean, or as small a part of it: a channel that was silent stays in range."""


@dataclass(frozen=True)
class Smoothing:
    """What was chosen for one site.

    Attributes:
        vector: s [in].
        activation_scale: of x ÷ s.
        alpha: None where nothing is moved.
        headroom: the largest |x ÷ s| that is kept ÷ the largest that was seen.
        error: squared error of the output ÷ its square, on rows that s and scale were not made from.
        first_error: the same at position 0, ÷ the larger of both squares.
        plain_error: ``error`` without smoothing and headroom.
    """

    vector: Floats
    activation_scale: float
    alpha: float | None
    headroom: float
    error: float
    first_error: float
    plain_error: float

    def as_report(self) -> dict[str, Any]:
        """All but the vector."""
        return {
            "alpha": self.alpha,
            "headroom": self.headroom,
            "activation_scale": self.activation_scale,
            "error": self.error,
            "first_error": self.first_error,
            "plain_error": self.plain_error,
        }


def smooth(
    config: LlamaConfig, statistics: Statistics, sites: Iterable[str], read: Callable[[str], NDArray[Any]], progress: Progress = silent
) -> dict[str, Smoothing]:
    """Search every site; no graph is needed.

    Args:
        config: says which channels of o_proj share a factor.
        statistics: what calibration measured.
        sites: their names; q·k·v and gate·up are one site each.
        read: site → weights [out, in] of all its linears, one above the other.
        progress: told which site is searched.

    Returns:
        Site → what was chosen.

    Raises:
        QuantizationError: the statistics are another model's.
    """
    names, found = list(sites), {}
    for done, site in enumerate(names):
        progress(f"smoothing {site}", done, len(names))
        tie = _by_groups(config) if site.endswith("o_proj") else _apart
        found[site] = search(read(site).astype(np.float32), statistics.of(site), tie)
    return found


def search(weight: Floats, measured: SiteStatistics, tie: Tie | None = None) -> Smoothing:
    """The α and headroom with the least error on rows that did not take part.

    Args:
        weight: [out, in].
        measured: of the input.
        tie: makes channels share a factor.
    """
    tied = tie or _apart
    weights = tied(_largest(weight))
    parts, some = folds(measured), np.ascontiguousarray(some_of(weight, OUTPUTS))
    tries = {(alpha, headroom): np.zeros(2) for alpha in (None, *ALPHAS) for headroom in (HEADROOMS if alpha is not None else PLAIN)}
    for made_from, samples in parts:
        trial = Trial(some, samples, measured.first)
        for alpha in (None, *ALPHAS):
            vector = factors(tied(made_from), weights, alpha)
            headrooms = [headroom for of, headroom in tries if of == alpha]
            scales = [_scale(made_from, vector, headroom) for headroom in headrooms]
            for headroom, errors in zip(headrooms, trial.errors(vector, scales, round_plainly_by_row(some * vector)), strict=True):
                tries[alpha, headroom] += errors / len(parts)
    alpha, headroom = min(tries, key=lambda key: float(tries[key].sum()))
    vector = factors(tied(measured.absmax), weights, alpha)
    error, first_error = (float(one) for one in tries[alpha, headroom])
    plain = float(tries[None, PLAIN[0]][0])
    return Smoothing(vector, _scale(measured.absmax, vector, headroom), alpha, headroom, error, first_error, plain)


def unsmoothed(measured: SiteStatistics) -> Smoothing:
    """One scale from the largest |x|, and nothing moved: what static quantisation is without any of this."""
    vector, nothing = np.ones(len(measured.absmax), np.float32), float("nan")
    return Smoothing(vector, _scale(measured.absmax, vector, 1.0), None, 1.0, nothing, nothing, nothing)


def factors(inputs: Floats, weights: Floats, alpha: float | None) -> Floats:
    """The vector s [in] from the largest |x| and |w| of every channel; its geometric mean is 1. None moves nothing."""
    if alpha is None:
        return np.ones(len(inputs), np.float32)
    logarithm = alpha * np.log(np.maximum(inputs, LEAST)) - (1 - alpha) * np.log(np.maximum(weights, LEAST))
    bound = np.log(LARGEST_FACTOR)
    vector: Floats = np.exp(np.clip(logarithm - logarithm.mean(), -bound, bound)).astype(np.float32)
    return vector


def _scale(absmax: Floats, vector: Floats, headroom: float) -> float:
    return headroom * max(float((absmax / vector).max()), LEAST) / HIGHEST


def _largest(weight: Floats) -> Floats:
    """Largest |w| of every input channel: [in]."""
    largest: Floats = np.maximum(weight.max(axis=0), -weight.min(axis=0))
    return largest


def _apart(vector: Floats) -> Floats:
    return vector


def _by_groups(config: LlamaConfig) -> Tie:
    """Query heads that read the same values share the largest of theirs: [H·D] → [H·D]."""
    shape = (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim)

    def tie(vector: Floats) -> Floats:
        heads = vector.reshape(shape)
        return np.broadcast_to(heads.max(axis=1, keepdims=True), shape).reshape(-1)

    return tie
