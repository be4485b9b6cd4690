"""Scores of every token of some texts: its likelihood, and how far the prediction is from the reference's.

A window slides over the text by half its size. The first scores all its tokens, a later one the second half, so that whatever is not at the text's
own beginning has at least half a window before it: predictions at the start of a window would measure the window, not the model.

      text     BOS a b c d e f g h i j        a model without BOS reads the text's first token, and does not score it
      window   BOS a b c                      scores a b c d
                   BOS c d e                  scores e f
                       BOS e f g              scores g h
Letters: n inputs of a window, m of them scored, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation import metrics

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
WINDOW = 512
"""Tokens that a model reads at once; fewer where its own maximum is shorter."""
DEFAULT_TOKENS, LEAST_OF_A_TEXT = 2048, 1024
"""Tokens that are scored in all, and of each text at least, where nothing is asked for."""


@dataclass(frozen=True)
class Window:
    """What a model reads, and the tokens that follow the last of them.

    Attributes:
        inputs: [n] int64.
        targets: [m] int64, m ≤ n: what follows each of the last m inputs.
        text: which text they are of.
    """

    inputs: Ids
    targets: Ids
    text: int = 0


@dataclass(frozen=True)
class TokenScores:
    """What one model says of every scored token, in order.

    Attributes:
        nll: negative log-likelihood, nats.
        kl: divergence from the reference, nats; of the reference itself 0, and the next two 1.
        best: 1 where the best token is the reference's.
        shared: share of the reference's ``metrics.TOP`` best tokens that are among this model's.
    """

    nll: Floats
    kl: Floats
    best: Floats
    shared: Floats


def default_tokens(texts: int) -> int:
    """Tokens to score of so many texts together."""
    return max(DEFAULT_TOKENS, LEAST_OF_A_TEXT * texts)


def shares(scored: int, texts: int) -> list[int]:
    """Tokens to score of each text, as equal as can be."""
    return [scored // texts + (index < scored % texts) for index in range(texts)]


def stride_of(size: int) -> int:
    """Tokens that a window scores after the first; the others are read only."""
    return max(1, size // 2)


def make_windows(tokens: Ids, scored: int, size: int, bos: int | None, text: int = 0) -> list[Window]:
    """Windows that score ``scored`` tokens in all, each once.

    With BOS every token of the text is scored, the first after BOS alone; without, the very first token is only read.

    Args:
        tokens: the text, at least ``scored`` tokens, and one more without BOS.
        scored: how many to score.
        size: inputs of a window, BOS among them.
        bos: id that starts every window, or None.
        text: which text it is.
    """
    before = [bos] if bos is not None else []
    stream = np.concatenate((before, tokens)).astype(np.int64)
    windows: list[Window] = []
    done = 0
    while done < scored:
        end = min(done + (stride_of(size) if windows else size), scored)
        inputs = stream[max(0, end - size) : end].copy()
        if bos is not None:
            inputs[0] = bos
        windows.append(Window(inputs, stream[done + 1 : end + 1], text))
        done = end
    return windows


def scored_of(windows: Sequence[Window]) -> list[int]:
    """Scored tokens of each text, from the first to the last that has windows."""
    last = max((window.text for window in windows), default=-1)
    return [sum(len(window.targets) for window in windows if window.text == index) for index in range(last + 1)]


def score(windows: Sequence[Window], logits: Callable[[int], NDArray[Any]], reference: Callable[[int], NDArray[Any]] | None = None) -> TokenScores:
    """Score every window.

    Args:
        windows: what to score.
        logits: index of a window → its logits, of all inputs [n, V] or of the scored ones [m, V].
        reference: the same of the reference; None where it is the reference that is scored.
    """
    if reference is None:
        nll = [metrics.negative_log_likelihoods(_scored(logits(i), window), window.targets) for i, window in enumerate(windows)]
        known = np.concatenate(nll)
        return TokenScores(known, np.zeros_like(known), np.ones_like(known), np.ones_like(known))
    parts = [metrics.token_scores(_scored(logits(i), window), _scored(reference(i), window), window.targets) for i, window in enumerate(windows)]
    return TokenScores(*(np.concatenate(side) for side in zip(*parts, strict=True)))


def _scored(logits: NDArray[Any], window: Window) -> NDArray[Any]:
    return logits[len(logits) - len(window.targets) :]
