"""What a graph gave for each row of a batch, padding removed: the same for both cache forms and for plans.

Letters: B batch, S new tokens of a call, L real tokens of a row, W columns or slots of a cache, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.calls import Side, Turn
from validation.scenarios import Scenario

Array = NDArray[Any]


@dataclass
class RowResult:
    """What a graph computed for one row of a scenario, padding removed.

    Attributes:
        positions: token indices that have logits; all of them, or the last of each call where a graph gathers one position.
        logits: [len(positions), V], the graph's dtype.
        keys, values: per layer [K, L, D], the graph's dtype, after the last call.
        strays: static caches that hold something wrong beyond the row's tokens (stray_slots.py).
    """

    positions: NDArray[np.int64]
    logits: Array
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    def gathered(self, positions: NDArray[np.int64]) -> RowResult:
        """Some positions alone, copied, without the caches."""
        at = np.searchsorted(self.positions, positions)
        assert np.array_equal(self.positions[at], positions)
        return RowResult(positions, self.logits[at].copy())


def row_results(scenario: Scenario, logits: Sequence[Array], caches: Sequence[Array], padding: Side) -> list[RowResult]:
    """Take padding off.

    Args:
        scenario: what was run.
        logits: of each call, [B, S, V], or [B, 1, V] where the graph gathers each row's last new token.
        caches: keys and values of each layer in turn after the last call, [B, K, W, D].
        padding: where it stands, in calls and in caches.
    """
    results = []
    for row, ids in enumerate(scenario.rows):
        pieces = [_real(turn, row, of_call[row], padding) for turn, of_call in zip(scenario.turns(), logits, strict=True)]
        positions, real = (np.concatenate(side) for side in zip(*pieces, strict=True))
        keys, values = ([tensor[row][:, _slots(tensor.shape[2], len(ids), padding)] for tensor in caches[kind::2]] for kind in (0, 1))
        results.append(RowResult(positions, real, keys, values))
    return results


def _real(turn: Turn, row: int, logits: Array, padding: Side) -> tuple[NDArray[np.int64], Array]:
    """Positions and logits [n, V] of a row in one call, from [S, V], or from [1, V] if only its last new token has logits."""
    end = turn.past[row] + len(turn.new[row])
    given = min(len(turn.new[row]), len(logits))
    return np.arange(end - given, end, dtype=np.int64), logits[_slots(len(logits), given, padding)]


def _slots(width: int, real: int, padding: Side) -> slice:
    return slice(width - real, width) if padding == "left" else slice(real)
