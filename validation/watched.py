"""What a graph gives is looked at as it passes: logits that are not finite, caches that hold what no call wrote, cuts that are not the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from validation import tolerances
from validation.measurement import StageMeasurement
from validation.row_result import Array, RowResult
from validation.scenarios import Scenario
from validation.side import Running, Side
from validation.tolerances import Limit

NONFINITE, STRAY, JOINED = "nonfinite_logits", "stray_slots", "joined_cuts"


@dataclass
class Watched:
    """A loaded graph; its methods are those of ``Running``. What is run twice is counted once.

    Attributes:
        runner: the graph.
        side: the same, not loaded.
        nonfinite: scenario, or text → logits that are NaN or inf.
        strays: scenario → static caches that hold something wrong, each with its row.
    """

    runner: Running
    side: Side
    nonfinite: dict[str, int] = field(default_factory=dict)
    strays: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.one_position = self.runner.one_position

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row."""
        rows = self.runner.run(scenario)
        self.nonfinite[scenario.name] = sum(_nonfinite(row.logits) for row in rows)
        self.strays[scenario.name] = [f"{scenario.name}, row {number}: {stray}" for number, row in enumerate(rows) for stray in row.strays]
        return rows

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence from an empty cache."""
        logits = self.runner.logits(ids)
        self.nonfinite[f"text {ids.tobytes().hex()}"] = _nonfinite(logits)
        return logits

    def faults(self) -> dict[str, list[tuple[int, str]]]:
        """Check → how many, and where; checks that do not apply are not there."""
        found = {NONFINITE: [(count, place.partition(" ")[0]) for place, count in self.nonfinite.items() if count]}
        if self.side.kv_cache == "static":
            found[STRAY] = [(1, stray) for strays in self.strays.values() for stray in strays]
        if self.runner.joined is not None:
            found[JOINED] = [(1, cut) for cut in self.runner.joined]
        return found


def record_faults(measured: StageMeasurement, *graphs: Watched) -> None:
    """Add up what was seen of some graphs; the first is named, with the graph where there are several."""
    for graph in graphs:
        for check, found in graph.faults().items():
            measured.numbers[check] = (measured.numbers.get(check) or 0) + sum(count for count, _ in found)
            if found:
                place = found[0][1] if len(graphs) == 1 else f"{graph.side.graph.parent.name}/{graph.side.graph.name}: {found[0][1]}"
                measured.where.setdefault(check, place)


def fault_limits(kind: tolerances.Kind, sides: Sequence[Side], *, streamed: bool) -> list[Limit]:
    """What graphs must hold whatever they are compared with; a lone file is never streamed."""
    static, cut = any(side.kv_cache == "static" for side in sides), streamed and any(side.lone is None for side in sides)
    rows = (*(tolerances.STATIC if static else ()), *(tolerances.STREAMED if cut else ()))
    finite = Limit(kind, NONFINITE, "==", 0, "no logit is NaN or inf, in scenarios and texts")
    return [finite, *(row for row in rows if row.kind == kind)]


def _nonfinite(logits: Array) -> int:
    return int(np.count_nonzero(~np.isfinite(logits)))
