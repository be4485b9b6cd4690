"""How far two sets of logits, or two caches, are from each other. Pure functions of numpy arrays; NaN stays NaN.

Letters: n positions, V vocab.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]
BLOCK = 64
"""Positions handled at a time: [64, V] in float64 is 25 MB at V = 49,152."""
TOP = 5
"""Best tokens that are compared as a set."""
_nan_stays = np.errstate(invalid="ignore", over="ignore")
"""What is not finite is a result here, not a warning."""


@_nan_stays
def absolute_errors(logits: Array, reference: Array) -> tuple[Floats, Floats]:
    """Mean and largest |logit − reference| of every position: [n], [n]."""
    mean, largest = np.empty(len(logits)), np.empty(len(logits))
    for block in _blocks(len(logits)):
        difference = np.abs(logits[block].astype(np.float32) - reference[block].astype(np.float32))
        mean[block] = difference.mean(axis=-1, dtype=np.float64)
        largest[block] = difference.max(axis=-1)
    return mean, largest


@_nan_stays
def log_softmax(logits: Array) -> Array:
    """[n, V] any float → [n, V] float32, natural logarithm."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return shifted


def kl_divergence(logits: Array, reference: Array) -> Floats:
    """KL(reference ‖ logits) of every position, nats: [n]."""
    result = np.empty(len(logits))
    for block in _blocks(len(logits)):
        result[block] = _kl(log_softmax(logits[block]), log_softmax(reference[block]))
    return result


def negative_log_likelihoods(logits: Array, targets: NDArray[np.int64]) -> Floats:
    """−log p(target) of every position, nats: logits [n, V], targets [n] → [n]."""
    result = np.empty(len(logits))
    for block in _blocks(len(logits)):
        result[block] = _nll(log_softmax(logits[block]), targets[block])
    return result


def token_scores(logits: Array, reference: Array, targets: NDArray[np.int64]) -> tuple[Floats, Floats, Floats, Floats]:
    """All that is asked of scored tokens, in one pass: most of the time is the softmax of [n, V].

    Returns:
        ``negative_log_likelihoods`` and ``kl_divergence``; then 1 where the best token is the reference's, else 0, and the share of the
        reference's ``TOP`` best tokens that are among the ``TOP`` best; four times [n].
    """
    nll, kl, best, shared = np.empty((4, len(logits)))
    for block in _blocks(len(logits)):
        log_q, log_p = log_softmax(logits[block]), log_softmax(reference[block])
        nll[block], kl[block] = _nll(log_q, targets[block]), _kl(log_q, log_p)
        best[block] = logits[block].argmax(axis=-1) == reference[block].argmax(axis=-1)  # of equal float16 logits the first, as a decoder takes it
        ours, theirs = best_tokens(logits[block]), best_tokens(reference[block])
        shared[block] = (ours[:, :, None] == theirs[:, None]).any(axis=2).mean(axis=1)
    return nll, kl, best, shared


def top1_agreement(logits: Array, reference: Array) -> float:
    """Share of positions whose best token is the reference's."""
    return float((logits.argmax(axis=-1) == reference.argmax(axis=-1)).mean())


@_nan_stays
def decisive_disagreements(logits: Array, reference: Array, noise: Floats) -> tuple[int, int]:
    """Positions where the reference is sure and the graph says something else.

    A position is decisive where the reference's margin (best − second best logit) exceeds twice ``noise`` [n], the floor's largest error
    there: neither logit can have moved so far by rounding.

    Returns:
        Disagreements at decisive positions, decisive positions.
    """
    best_two = np.partition(reference, -2, axis=-1)[:, -2:]  # [n, 2], ascending
    decisive = best_two[:, 1] - best_two[:, 0] > 2 * noise
    different = logits.argmax(axis=-1) != reference.argmax(axis=-1)
    return int((decisive & different).sum()), int(decisive.sum())


@_nan_stays
def relative_error(values: Array, reference: Array) -> float:
    """Root mean square of the error over root mean square of the reference."""
    wide = reference.astype(np.float64)
    scale = float(np.sqrt(np.mean(wide**2)))
    error = float(np.sqrt(np.mean((values.astype(np.float64) - wide) ** 2)))
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


@_nan_stays
def _kl(log_q: Array, log_p: Array) -> Floats:
    """Sum of p·(d + e⁻ᵈ − 1), d = log p − log q: that of p·d with no term below 0: small divergences do not drown in rounding."""
    d = np.maximum(log_p - log_q, -80)  # e⁸⁰ is a float32; beyond that the divergence is tens of nats anyway
    return np.asarray((np.exp(log_p) * (d + np.expm1(-d))).sum(axis=-1, dtype=np.float64))


def best_tokens(logits: Array) -> NDArray[np.int64]:
    """[n, V] → [n, TOP], in any order; fewer where V is smaller. PyTorch's, because numpy's partition takes ten times as long."""
    found: NDArray[np.int64] = torch.from_numpy(logits.astype(np.float32)).topk(min(TOP, logits.shape[1])).indices.numpy()
    return found


def _nll(log_q: Array, targets: NDArray[np.int64]) -> Floats:
    return -log_q[np.arange(len(log_q)), targets].astype(np.float64)


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
