"""How far one scenario of a graph is from the reference: its logits at real positions, and its caches.

Letters: L real tokens of a row, K kv heads, D head_dim, N layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation import metrics
from validation.graph_runner import RowResult
from validation.oracle import Oracle
from validation.scenarios import Scenario

Array = NDArray[Any]


def compare_scenario(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> dict[str, Any]:
    """One scenario's entry: real positions of all rows together."""
    pairs = [(row.logits, oracle.logits[sequence][row.positions]) for row, sequence in zip(rows, scenario.sequences, strict=True)]
    ours, reference = (np.concatenate(side) for side in zip(*pairs, strict=True))
    mean, largest = metrics.absolute_errors(ours, reference)
    noise = [oracle.floor.noise(sequence, row.positions) for row, sequence in zip(rows, scenario.sequences, strict=True)]
    known = [values for values in noise if values is not None]
    decisive = metrics.decisive_disagreements(ours, reference, np.concatenate(known)) if known else (None, None)
    return {
        "scenario": scenario.name,
        "positions": len(ours),
        "calls": len(scenario.chunks),
        "max_abs": float(largest.max()),
        "mean_abs": float(mean.mean()),
        "cache_max_abs": float(np.max([np.abs(ours.astype(np.float32) - theirs).max() for ours, theirs in _cache_pairs(oracle, scenario, rows)])),
        "mean_kl": float(metrics.kl_divergence(ours, reference).mean()),
        "top1_agreement": metrics.top1_agreement(ours, reference),
        "decisive_disagreements": decisive[0],
        "decisive_positions": decisive[1],
    }


def own_difference(scenario: Scenario, row: RowResult, prefill: RowResult) -> float:
    """Mean |logit − the same graph's in prefill| over the positions that were computed from a cache.

    Args:
        scenario: how the row was cut into calls.
        row: a row that begins with the tokens of prefill, without padding.
        prefill: all positions in one call.
    """
    cached = row.positions[row.positions >= scenario.chunks[0]]
    mean, _ = metrics.absolute_errors(row.logits[cached], prefill.logits[cached])
    return float(mean.mean())


def cache_errors(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> NDArray[np.float64]:
    """Relative error of every layer's keys and values, the worst row: [N, 2]."""
    errors = [metrics.relative_error(*pair) for pair in _cache_pairs(oracle, scenario, rows)]
    worst: NDArray[np.float64] = np.max(np.reshape(errors, (len(rows), -1, 2)), axis=0)
    return worst


def _cache_pairs(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> Iterator[tuple[Array, Array]]:
    """(graph's, reference's) [K, L, D] of each row, each layer, keys then values."""
    for row, sequence in zip(rows, scenario.sequences, strict=True):
        run = oracle.runs[sequence]
        for layer in range(len(run.keys)):
            for ours, theirs in ((row.keys[layer], run.keys[layer]), (row.values[layer], run.values[layer])):
                yield ours, theirs[:, : ours.shape[1]]
