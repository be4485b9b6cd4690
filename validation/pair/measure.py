"""Measure one graph against another: the four scenarios call by call, the texts, and every layer alone where both can be cut."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from artifact.errors import FusionError
from artifact.progress import Progress
from validation import tolerances
from validation.measurement import StageMeasurement
from validation.pair.layers import layer_differences
from validation.pair.oracle import NO_FLOOR, GraphOracle
from validation.row_result import RowResult
from validation.scenario_errors import cache_errors, compare_scenario
from validation.side import Running, Side
from validation.stage import judged, run_parts, stage_entry
from validation.structure import ONE_POSITION, TEXT_NUMBERS, score_text, summarise, worst_cache
from validation.tolerances import Limit

Report = dict[str, Any]


def limits_of(max_kl: float | None, kind: tolerances.Kind) -> list[Limit]:
    """What a comparison must hold: finite logits, and the divergence that was asked for."""
    finite = Limit(kind, "nonfinite_logits", "==", 0, "no logit is NaN or inf where the other graph's is finite")
    return [finite, *([] if max_kl is None else [Limit(kind, "mean_kl", "<=", max_kl, "nats; asked for with --max-kl")])]


def measure_pair(oracle: GraphOracle, side: Side, runner: Running, max_kl: float | None, progress: Progress) -> Report:
    """Hold one graph against another.

    Args:
        oracle: the other graph, with the scenarios that both take.
        side, runner: the graph, loaded and told what it will be asked for.
        max_kl: the largest mean divergence, nats; None compares, and judges nothing but that all is finite.
        progress: told what is being done.

    Returns:
        The stage's entry of the report: ``passed`` is None where it was compared and not judged.
    """
    start, measured = time.perf_counter(), StageMeasurement()

    def run() -> None:
        _scenarios(oracle, runner, measured)
        if oracle.windows:
            score_text(oracle, runner, measured)
        elif side.one_position:
            measured.missing["perplexity_increase_pct"] = ONE_POSITION

    failed = run_parts(side.name, {"scenarios and perplexity": run}, measured, progress)
    checks = [*map(tolerances.failed_to_run, failed), *judged(measured, limits_of(max_kl, side.kind))]
    entry = stage_entry(side.name, side.kind, measured, checks, time.perf_counter() - start)
    return entry | {"passed": None if entry["passed"] and max_kl is None else entry["passed"]}


def compare_layers(theirs: Side, ours: Side, oracle: GraphOracle, progress: Progress) -> Report:
    """The report's ``layers`` of a pair: difference of every layer fed the same; or ``missing``, why not."""
    if theirs.one_position or ours.one_position:
        return {"missing": "an engine graph has its stage's layers"}
    try:
        return layer_differences(theirs.graph, ours.graph, oracle.scenarios[0].rows[0], progress).as_report()
    except FusionError as error:
        return {"missing": str(error)}


def _scenarios(oracle: GraphOracle, runner: Running, measured: StageMeasurement) -> None:
    measured.numbers["nonfinite_logits"] = 0
    caches = []
    for scenario in oracle.scenarios:
        truth, rows = oracle.truth.run(scenario), runner.run(scenario)
        pairs = list(zip(truth, rows, strict=True))
        measured.numbers["nonfinite_logits"] += sum(int((np.isfinite(first.logits) & ~np.isfinite(second.logits)).sum()) for first, second in pairs)
        if not truth[0].keys:
            rows = [RowResult(row.positions, row.logits) for row in rows]
        seen = oracle.seen_in(scenario, truth)
        measured.scenarios.append(compare_scenario(seen, scenario, rows))
        caches += [cache_errors(seen, scenario, rows)] if rows[0].keys else []
    measured.numbers |= dict.fromkeys(TEXT_NUMBERS)
    summarise(oracle, measured)
    worst_cache(measured, caches)
    measured.missing["noise_ratio"] = NO_FLOOR
