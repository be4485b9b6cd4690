"""What of the reference's logits is kept, and what divergence is had of it: k best tokens, the log-sum-exp, the rest as one bucket, a sample of it.

    KL(p ‖ q)  =  Σ over the k best of p·log(p/q)  +  P·log(P/Q)  +  P · KL(p within the rest ‖ q within the rest)
                  └──────────── known exactly: the lower bound ────────────┘   └── estimated from tokens drawn from p within the rest ──┘

P and Q are the mass that the reference and the other model give to all but the k best. Lumping can only lower a divergence (the log-sum inequality),
so the first two terms are a lower bound. The third needs every token's p; tokens that were drawn by it while it was there give it without bias.
Letters: n positions, V vocab, k best kept, s drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from validation import metrics

Array = NDArray[Any]
Floats = NDArray[np.float64]
TOP_K, DRAWN, SEED = 128, 16, 0
LEAST_K = metrics.TOP
"""So many are compared as a set."""


@dataclass(frozen=True)
class Predictions:
    """The reference at n positions.

    Attributes:
        top_logits: [n, k] float32, descending; ``top_ids`` whose they are.
        log_sum_exp: [n] float32, of all V logits.
        log_rest: [n] float32, logarithm of the probability of all tokens but the k; −inf where there are no others.
        drawn_logits: [n, s] float32 of tokens drawn from the rest by their probability, with replacement; ``drawn_ids`` whose they are.
    """

    top_logits: Array
    top_ids: Array
    log_sum_exp: Array
    log_rest: Array
    drawn_logits: Array
    drawn_ids: Array

    def __len__(self) -> int:
        return len(self.log_sum_exp)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Predictions:
        return Predictions(*(getattr(self, name)[rows] for name in FIELDS))


FIELDS = ("top_logits", "top_ids", "log_sum_exp", "log_rest", "drawn_logits", "drawn_ids")


@dataclass(frozen=True)
class Divergence:
    """Of another model from the reference, of every position [n].

    Attributes:
        kl: the estimate, nats.
        lower: the lower bound.
        best: 1 where the best token is the reference's, else 0.
        shared: share of the reference's ``metrics.TOP`` best tokens that are among the other's.
    """

    kl: Floats
    lower: Floats
    best: Floats
    shared: Floats


def keep(logits: Array, k: int, drawn: int, random: np.random.Generator) -> Predictions:
    """Keep what is needed of logits [n, V] float32; fewer than k where V is smaller."""
    parts = [_keep(logits[start : start + metrics.BLOCK], min(k, logits.shape[1]), drawn, random) for start in range(0, len(logits), metrics.BLOCK)]
    return join(parts)


def join(parts: list[Predictions]) -> Predictions:
    """Predictions one after the other."""
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


def diverge(kept: Predictions, logits: Array) -> Divergence:
    """Hold another model's logits [n, V] against what is kept."""
    parts = [_diverge(kept[start : start + metrics.BLOCK], logits[start : start + metrics.BLOCK]) for start in range(0, len(logits), metrics.BLOCK)]
    return Divergence(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("kl", "lower", "best", "shared")))


def _keep(logits: Array, k: int, drawn: int, random: np.random.Generator) -> Predictions:
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    total = largest[:, 0] + np.log(np.exp(wide - largest).sum(axis=-1))
    best = torch.from_numpy(np.ascontiguousarray(logits, np.float32)).topk(k)
    ids = best.indices.numpy()
    rest = np.exp(wide - total[:, None])
    np.put_along_axis(rest, ids, 0.0, axis=-1)
    mass = rest.sum(axis=-1)
    chosen = np.stack([_draw(row, drawn, random) for row in rest])
    with np.errstate(divide="ignore"):
        log_rest = np.log(mass)
    of_chosen = np.take_along_axis(logits, chosen, axis=-1)
    small = index_dtype(logits.shape[1])
    return Predictions(
        best.values.numpy(),
        ids.astype(small),
        total.astype(np.float32),
        log_rest.astype(np.float32),
        of_chosen.astype(np.float32),
        chosen.astype(small),
    )


def index_dtype(vocab_size: int) -> Any:
    """The smallest that holds every token id."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.uint32


def _draw(weights: Floats, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Indices [count], each by its weight; of no weight at all, 0: their share is then 0."""
    ends = np.cumsum(weights)
    return (
        np.minimum(np.searchsorted(ends, random.random(count) * ends[-1], side="right"), len(weights) - 1) if ends[-1] else np.zeros(count, np.int64)
    )


def _diverge(kept: Predictions, logits: Array) -> Divergence:
    log_q = metrics.log_softmax(logits).astype(np.float64)
    ids = kept.top_ids.astype(np.int64)
    log_p = kept.top_logits.astype(np.float64) - kept.log_sum_exp.astype(np.float64)[:, None]
    of_top = _terms(log_p, np.take_along_axis(log_q, ids, axis=-1)).sum(axis=-1)
    others = np.exp(log_q)
    np.put_along_axis(others, ids, 0.0, axis=-1)
    with np.errstate(divide="ignore"):
        log_other = np.log(others.sum(axis=-1))
    log_rest = kept.log_rest.astype(np.float64)
    lower = of_top + _terms(log_rest, log_other)
    ours = metrics.best_tokens(logits)
    theirs = ids[:, : ours.shape[1]]
    return Divergence(
        kl=lower + _within_rest(kept, log_q, log_rest, log_other),
        lower=lower,
        best=(logits.argmax(axis=-1) == ids[:, 0]).astype(np.float64),
        shared=(ours[:, :, None] == theirs[:, None]).any(axis=2).mean(axis=1),
    )


def _within_rest(kept: Predictions, log_q: Floats, log_rest: Floats, log_other: Floats) -> Floats:
    """P · KL within the rest [n]: the mean over drawn tokens of d + e⁻ᵈ − 1, whose last two terms are 0 on average and take most noise away."""
    if not kept.drawn_ids.shape[1]:
        return np.zeros(len(kept))
    chosen = kept.drawn_ids.astype(np.int64)
    log_p = kept.drawn_logits.astype(np.float64) - kept.log_sum_exp.astype(np.float64)[:, None]
    with np.errstate(invalid="ignore"):
        d = (log_p - log_rest[:, None]) - (np.take_along_axis(log_q, chosen, axis=-1) - log_other[:, None])
    mass = np.exp(log_rest)
    return np.where(mass > 0, mass * _convex(d).mean(axis=-1), 0.0)


def _terms(log_p: Floats, log_q: Floats) -> Floats:
    """p·log(p/q) + q − p of every entry: none is below 0, and where both sides sum to 1 their sum is the divergence."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * _convex(log_p - log_q)
    return np.where(np.isneginf(log_p), np.exp(log_q), terms)


def _convex(d: Floats) -> Floats:
    """Of d: d + e⁻ᵈ − 1, as ``metrics.kl_divergence`` has it."""
    bounded = np.maximum(d, -80)
    return np.asarray(bounded + np.expm1(-bounded))
