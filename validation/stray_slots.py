"""What a static cache holds beyond the tokens of a row: slots that were never written keep what they held, written ones are finite.

A masked slot is multiplied by 0, and 0 · NaN is NaN. So a graph that leaves NaN behind poisons the call after it, and one that writes into slots
that are not its own destroys what a longer row, or a later token, has there.
Letters: B batch, C capacity, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.io_spec import CACHE_KINDS, present_name
from validation.scenarios import Scenario

UNWRITTEN = 32.0
"""What the slots hold in the scenarios before they are written: finite, as the contract asks, in scores too, and large enough that a token that
reads one shows."""


def stray_slots(scenario: Scenario, row: int, caches: Sequence[NDArray[Any]]) -> list[str]:
    """Look beyond a row's tokens after the last call of a scenario.

    Args:
        scenario: what was run, on caches that held ``UNWRITTEN``.
        row: index in the batch.
        caches: keys and values of each layer in turn, [B, K, C, D].

    Returns:
        For each cache that is not as it should be, its first such slot: ``present.0.key slot 48 has changed``.
    """
    real, end = len(scenario.rows[row]), max(turn.past[row] + turn.width for turn in scenario.turns())
    return [
        f"{present_name(index // len(CACHE_KINDS), CACHE_KINDS[index % len(CACHE_KINDS)])} {what}"
        for index, tensor in enumerate(caches)
        for what in _first_stray(tensor[row], real, end)
    ]


def _first_stray(cache: NDArray[Any], real: int, end: int) -> Iterator[str]:
    """At most one, of [K, C, D]: tokens are in the slots below ``real``, padding in those below ``end``."""
    poisoned = np.flatnonzero((~np.isfinite(cache[:, real:end])).any(axis=(0, 2)))
    changed = np.flatnonzero((cache[:, end:] != UNWRITTEN).any(axis=(0, 2)))
    if len(poisoned):
        yield f"slot {real + poisoned[0]} holds padding that is not finite"
    elif len(changed):
        yield f"slot {end + changed[0]} has changed"
