"""The quality of one form of a model on some texts, against float32 and beside float16's own, with what of it the text's noise could be.

A difference whose 95 % interval holds zero is called inside noise: on other text of the kind it might as well have the other sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.bootstrap import BEYOND, INSIDE, Resampling, interval
from validation.perplexity import TokenScores

Floats = NDArray[np.float64]
TAIL = 0.99


def _as_is(mean: Any) -> Any:
    return mean


def percent_of(mean: Any) -> Any:
    """Mean difference of negative log-likelihood → difference of perplexity in per cent."""
    return np.expm1(mean) * 100


@dataclass(frozen=True)
class Measure:
    """A mean over tokens, and what is told of it: ``key`` of the report, the tokens' values, and the mean in the measure's unit."""

    key: str
    values: Callable[[TokenScores], Floats]
    told: Callable[[Any], Any] = _as_is


MEASURES = (
    Measure("perplexity_pct", lambda scores: scores.nll, percent_of),
    Measure("mean_kl", lambda scores: scores.kl),
    Measure("top1_agreement", lambda scores: scores.best),
)
"""What is compared with float16's own."""


@dataclass(frozen=True)
class Judge:
    """What scores are held against.

    Attributes:
        names: of the texts.
        resampling: of their tokens.
        reference: float32's scores.
        float16: float16's own; None where it was not run.
    """

    names: Sequence[str]
    resampling: Resampling
    reference: TokenScores
    float16: TokenScores | None = None

    def describe(self, scores: TokenScores) -> dict[str, Any]:
        """``all``: the texts together; ``texts``: each by itself."""
        each = [{"text": name} | self._of(scores, index) for index, name in enumerate(self.names)]
        return {"all": self._of(scores, None), "texts": each}

    def _of(self, scores: TokenScores, text: int | None) -> dict[str, Any]:
        part = self.resampling.slice(text)
        increase = self._estimate(scores.nll - self.reference.nll, text, percent_of)
        kl, best = (self._estimate(values, text) for values in (scores.kl, scores.best))
        return {
            "tokens": len(scores.nll[part]),
            "perplexity": float(np.exp(scores.nll[part].mean())),
            "reference_perplexity": float(np.exp(self.reference.nll[part].mean())),
            "perplexity_increase_pct": increase["value"],
            "perplexity_se_pct": increase["se"],
            "perplexity_interval_pct": increase["interval"],
            "perplexity_noise": increase["noise"],
            "mean_kl": kl["value"],
            "kl_interval": kl["interval"],
            "p99_kl": float(np.quantile(scores.kl[part], TAIL)),
            "top1_agreement": best["value"],
            "top1_interval": best["interval"],
            "top5_agreement": float(scores.shared[part].mean()),
            "against_float16": self._against_float16(scores, text),
        }

    def _against_float16(self, scores: TokenScores, text: int | None) -> dict[str, Any] | None:
        if self.float16 is None or scores is self.float16:
            return None
        return {each.key: self._estimate(each.values(scores) - each.values(self.float16), text, each.told) for each in MEASURES}

    def _estimate(self, values: Floats, text: int | None, told: Callable[[Any], Any] = _as_is) -> dict[str, Any]:
        """A mean over tokens, its standard error and interval, and whether zero is within."""
        draws = told(self.resampling.means(values, text))
        low, high = interval(draws)
        noise = INSIDE if low <= 0 <= high else None if np.isnan(low) else BEYOND
        return {
            "value": float(told(values[self.resampling.slice(text)].mean())),
            "se": float(draws.std(ddof=1)),
            "interval": [low, high],
            "noise": noise,
        }
