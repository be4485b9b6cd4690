"""The divergence of each row's prompt, chunk or steps alone: a fault of a few positions that no mean over a scenario or a text shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from validation.measurement import StageMeasurement
from validation.metrics import Floats
from validation.row_result import RowResult
from validation.scenarios import Scenario

PART = "part_kl"
Parts = list[tuple[float, str]]
"""Mean divergence, nats, and where."""


def parts_kl(scenario: Scenario, rows: Sequence[RowResult], kl: Sequence[Floats]) -> Parts:
    """Of every part that has logits; ``kl`` of each row is at its positions."""
    parts = [(part, np.isin(rows[part.row].positions, part.positions)) for part in scenario.parts()]
    return [(float(kl[part.row][at].mean()), part.where) for part, at in parts if at.any()]


def record_worst_part(measured: StageMeasurement, parts: Parts) -> None:
    """The worst part of all scenarios, and which it is where it is not 0."""
    value, where = parts[int(np.argmax([value for value, _ in parts]))]  # of NaN and numbers, NaN
    measured.numbers[PART] = value
    if value != 0:
        measured.where[PART] = where
