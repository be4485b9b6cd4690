"""The numbers of one stage, as they are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from validation.oracle import Oracle
from validation.ranges import RangeAudit
from validation.row_result import RowResult
from validation.scenarios import Scenario

NUMBERS = (
    "max_abs", "mean_abs", "max_abs_relative", "noise_ratio", "decode_noise_ratio", "part_noise_ratio", "strict_noise_ratio", "strict_nonfinite",
    "worst_local_ratio", "worst_local_layer", "range_peak", "range_tensor", "mean_kl", "top1_agreement", "decisive_disagreements", "scenario_spread",
    "self_consistency", "cache_error", "stray_slots", "cache_capacity", "perplexity", "perplexity_increase_pct", "perplexity_se_pct", "p99_kl",
    "top5_agreement", "joined_cuts", "first_layer_outside", "range_run",
)  # fmt: skip
"""Keys of every stage of the report, null where not measured."""


class ArtifactRunner(Protocol):
    """A graph of the artifact, whole or streamed; what its methods do is said at ``GraphRunner`` and ``StreamedRunner``."""

    one_position: bool
    capacity: int | None
    joined: list[str] | None
    layer_errors: list[float] | None

    def expect(  # noqa: D102
        self, scenarios: Sequence[Scenario], sequences: Sequence[NDArray[np.int64]], capacity: int = 0, *, alone: Sequence[NDArray[Any]] = ()
    ) -> None: ...

    def run(self, scenario: Scenario, capacity: int = 0) -> list[RowResult]: ...  # noqa: D102

    def logits(self, ids: NDArray[np.int64]) -> NDArray[Any]: ...  # noqa: D102


LastRows = dict[str, list[RowResult]]
"""Scenario → per row, the logits of each call's last position."""


@dataclass
class StageMeasurement:
    """The numbers of one stage, as they are gathered.

    Attributes:
        numbers: key of ``NUMBERS`` → value.
        hidden_errors: of the hidden state after each layer, relative (float16_costs.py).
        op_errors: of the layer with the worst local ratio, by kind of operator (op_errors.py).
        quality: on the texts (quality.py), and ``greedy``.
        where: check → layer, tensor or node that it is about.
        missing: check → why it has no value.
        seconds: part → how long it took.
        last_rows: logits that an engine graph must give too.
        rounded_ranges: largest float16 values of the strict run, for the range audit.
        layer_errors: of every layer alone, where they were measured with the scenarios.
    """

    numbers: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(NUMBERS))
    scenarios: list[dict[str, Any]] = field(default_factory=list)
    local_ratios: list[float] | None = None
    hidden_errors: list[float] | None = None
    op_errors: dict[str, Any] | None = None
    decode_errors: list[float] | None = None
    quality: dict[str, Any] | None = None
    where: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    last_rows: LastRows = field(default_factory=dict)
    rounded_ranges: RangeAudit | None = None
    layer_errors: list[float] | None = None


def record_join(measured: StageMeasurement, runner: ArtifactRunner) -> None:
    """Record whether the cuts of a streamed graph, joined, are the graph."""
    if runner.joined is not None:
        measured.numbers["joined_cuts"] = len(runner.joined)
        if runner.joined:
            measured.where["joined_cuts"] = runner.joined[0]


def run_scenario(oracle: Oracle, measured: StageMeasurement, runner: ArtifactRunner, scenario: Scenario) -> list[RowResult]:
    """Run a scenario, on caches of the oracle's capacity unless the graph fixes it, and record what is to be known of a static cache."""
    rows = runner.run(scenario, oracle.capacity)
    if oracle.kv_cache == "static":
        measured.numbers["cache_capacity"] = runner.capacity or oracle.capacity
        _count_strays(measured, scenario, rows)
    return rows


def _count_strays(measured: StageMeasurement, scenario: Scenario, rows: Sequence[RowResult]) -> None:
    """Add what a scenario left where nothing was to be written; the first is named."""
    found = [f"{scenario.name}, row {row}: {stray}" for row, result in enumerate(rows) for stray in result.strays]
    measured.numbers["stray_slots"] = (measured.numbers["stray_slots"] or 0) + len(found)
    if found:
        measured.where.setdefault("stray_slots", found[0])


def against_floor(oracle: Oracle, measured: StageMeasurement, check: str, mean_abs: float) -> None:
    """Record an error as a multiple of the floor, or why there is none."""
    if oracle.floor.mean_abs:
        measured.numbers[check] = mean_abs / oracle.floor.mean_abs
    else:
        measured.missing[check] = oracle.floor.missing
