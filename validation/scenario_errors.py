"""How far one scenario of a graph is from the reference and from the graph itself: its logits at real positions, and its caches.

Letters: L real tokens of a row, K kv heads, D head_dim, N layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation import metrics
from validation.oracle import Oracle
from validation.row_result import RowResult
from validation.scenarios import Part, Scenario

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Alone:
    """What a graph gives for one sequence alone, in one call from an empty cache.

    Attributes:
        logits: [L, V].
        errors: mean |logit − reference| of every position [L].
    """

    logits: Array
    errors: Floats


def alone(oracle: Oracle, sequence: int, logits: Array) -> Alone:
    """The logits of a sequence, with their errors."""
    return Alone(logits, metrics.absolute_errors(logits, oracle.logits[sequence])[0])


def compare_scenario(oracle: Oracle, scenario: Scenario, rows: list[RowResult], own: Sequence[Alone] | None = None) -> dict[str, Any]:
    """One scenario's entry.

    Means are over the positions that are the scenario's own (``Scenario.is_new``), their number is ``judged``; what is largest or counted is over all
    real positions.

    Args:
        oracle: the reference.
        scenario: what was run.
        rows: what the graph gave.
        own: what it gives for each sequence alone; None where that is not to be compared.
    """
    pairs = [(row.logits, oracle.logits[sequence][row.positions]) for row, sequence in zip(rows, scenario.sequences, strict=True)]
    errors = [metrics.absolute_errors(*pair) for pair in pairs]
    ours, reference = (np.concatenate(side) for side in zip(*pairs, strict=True))
    mean, largest = (np.concatenate(side) for side in zip(*errors, strict=True))
    new = np.concatenate([scenario.is_new(row.positions) for row in rows])
    noise = [oracle.floor.noise(sequence, row.positions) for row, sequence in zip(rows, scenario.sequences, strict=True)]
    known = [values for values in noise if values is not None]
    decisive = metrics.decisive_disagreements(ours, reference, np.concatenate(known)) if known else (None, None)
    return {
        "scenario": scenario.name,
        "positions": len(ours),
        "judged": int(new.sum()),
        "calls": len(scenario.chunks),
        "max_abs": float(largest.max()),
        "mean_abs": float(mean[new].mean()),
        "cache_max_abs": _largest_cache_error(oracle, scenario, rows),
        "mean_kl": float(metrics.kl_divergence(ours[new], reference[new]).mean()),
        "top1_agreement": metrics.top1_agreement(ours[new], reference[new]),
        "decisive_disagreements": decisive[0],
        "decisive_positions": decisive[1],
        "parts": list(_compare_parts(oracle, scenario, rows, [mean for mean, _ in errors], own)),
    }


def _compare_parts(
    oracle: Oracle, scenario: Scenario, rows: list[RowResult], errors: list[Floats], own: Sequence[Alone] | None
) -> Iterator[dict[str, Any]]:
    """Every part alone, each measure at the part's own positions."""
    drifts = [_drift(row, own[sequence]) for row, sequence in zip(rows, scenario.sequences, strict=True)] if own else None
    for part in scenario.parts():
        at = np.isin(rows[part.row].positions, part.positions)
        if at.any():
            floor = oracle.floor.mean_at(scenario.sequences[part.row], rows[part.row].positions[at])
            error = float(errors[part.row][at].mean())
            entry = {"where": part.where, "row": part.row, "part": part.name, "positions": int(at.sum()), "mean_abs": error}
            entry |= {"noise_ratio": ratio(error, floor), "self_consistency": None, "spread": None}
            if own and drifts:
                entry |= _against_itself(part, error, float(drifts[part.row][at].mean()), floor, own[scenario.sequences[part.row]])
            yield entry


def _drift(row: RowResult, own: Alone) -> Floats:
    """Mean |logit − the same graph's for the sequence alone| of every position of a row."""
    return metrics.absolute_errors(row.logits, own.logits[row.positions])[0]


def _against_itself(part: Part, error: float, drift: float, floor: float | None, own: Alone) -> dict[str, Any]:
    """Two measures of a part against the sequence alone: of the logits themselves, and of their errors, below float16's own all alike."""
    alone = float(own.errors[part.positions].mean())
    return {"self_consistency": ratio(drift, floor), "spread": ratio(error, max(alone, floor or 0.0))}


def ratio(value: float, scale: float | None) -> float | None:
    """Value ÷ scale; None where there is no scale, inf where it is 0 and the value is not."""
    if scale is None:
        return None
    if scale:
        return value / scale
    return 0.0 if value == 0 else float("inf")


def _largest_cache_error(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> float | None:
    """Largest |difference| of keys and values; None where the graph gives none."""
    errors = [np.abs(ours.astype(np.float32) - theirs).max() for ours, theirs in _cache_pairs(oracle, scenario, rows)]
    return float(np.max(errors)) if errors else None


def cache_errors(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> NDArray[np.float64]:
    """Relative error of every layer's keys and values, the worst row: [N, 2]."""
    errors = [metrics.relative_error(*pair) for pair in _cache_pairs(oracle, scenario, rows)]
    worst: NDArray[np.float64] = np.max(np.reshape(errors, (len(rows), -1, 2)), axis=0)
    return worst


def _cache_pairs(oracle: Oracle, scenario: Scenario, rows: list[RowResult]) -> Iterator[tuple[Array, Array]]:
    """(graph's, reference's) [K, L, D] of each row, each layer, keys then values."""
    for row, sequence in zip(rows, scenario.sequences, strict=True):
        run = oracle.runs[sequence]
        for layer in range(len(row.keys)):
            for ours, theirs in ((row.keys[layer], run.keys[layer]), (row.values[layer], run.values[layer])):
                yield ours, theirs[:, : ours.shape[1]]
