"""Perplexity of every stage on the same tokens, with a paired standard error, and KL to the reference.

The error of the increase is that of the difference at each token: most of perplexity's noise is the text's and cancels. KL has a tenth of its noise.
Letters: V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation import metrics

Ids = NDArray[np.int64]
WINDOW = 512
DEFAULT_TOKENS = 2048


@dataclass(frozen=True)
class Window:
    """Input tokens, and for each of them the token that follows: [n], [n] int64."""

    inputs: Ids
    targets: Ids


@dataclass(frozen=True)
class TokenScores:
    """What one model says of every scored token, in order: negative log-likelihood and KL from the reference, nats; KL is None for the reference."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64] | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return float(np.exp(self.nll.mean()))


def make_windows(tokens: Ids, scored: int, size: int, bos: int | None) -> list[Window]:
    """Cut text into windows that score ``scored`` tokens in all.

    With BOS every token of the text is scored, the first of a window after BOS alone; without, a window begins with the last token of the one before,
    and the very first token is only read.

    Args:
        tokens: the text, at least ``scored`` tokens, and one more without BOS.
        scored: how many to score.
        size: inputs of a window.
        bos: id that starts every window, or None.
    """
    before = [bos] if bos is not None else []
    stream = np.concatenate((before, tokens)).astype(np.int64)
    windows = []
    for start in range(0, scored, size):
        end = min(start + size, scored)
        inputs = stream[start:end].copy()
        if bos is not None:
            inputs[0] = bos
        windows.append(Window(inputs, stream[start + 1 : end + 1]))
    return windows


def score(windows: Sequence[Window], logits: Callable[[int], NDArray[Any]], reference: Callable[[int], NDArray[Any]] | None = None) -> TokenScores:
    """Score every window.

    Args:
        windows: what to score.
        logits: index of a window → its logits [n, V].
        reference: the same of the reference, for KL.
    """
    if reference is None:
        return TokenScores(np.concatenate([metrics.negative_log_likelihoods(logits(i), window.targets) for i, window in enumerate(windows)]))
    scores = [metrics.token_scores(logits(i), reference(i), window.targets) for i, window in enumerate(windows)]
    nll, kl = (np.concatenate(side) for side in zip(*scores, strict=True))
    return TokenScores(nll, kl)


def increase_pct(scores: TokenScores, reference: TokenScores) -> tuple[float, float]:
    """Increase of perplexity over the reference and its paired standard error, both in per cent of the reference's perplexity."""
    difference = scores.nll - reference.nll
    ratio = float(np.exp(difference.mean()))
    standard_error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return (ratio - 1) * 100, ratio * standard_error * 100  # d exp(x) = exp(x) dx
