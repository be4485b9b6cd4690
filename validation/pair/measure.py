"""Measure one graph against another: the four scenarios call by call, the texts, and every layer alone where both can be cut."""

from __future__ import annotations

import time
from typing import Any

from artifact.errors import FusionError
from artifact.progress import Progress
from validation import tolerances
from validation.measurement import StageMeasurement
from validation.metrics import kl_divergence
from validation.pair.layers import layer_differences
from validation.pair.oracle import NO_FLOOR, GraphOracle
from validation.part_kl import PART, Parts, parts_kl, record_worst_part
from validation.row_result import RowResult
from validation.scenario_errors import cache_errors, compare_scenario
from validation.side import Side
from validation.stage import judged, run_parts, stage_entry
from validation.structure import ONE_POSITION, TEXT_NUMBERS, score_text, summarise, worst_cache
from validation.tolerances import Limit
from validation.watched import NONFINITE, Watched, fault_limits, record_faults

Report = dict[str, Any]


ASKED = "nats; asked for with --max-kl"
PARTS = f"{ASKED}: the worst of each row's prompt, chunk or steps"


def limits_of(max_kl: float | None, sides: tuple[Side, Side], *, streamed: bool) -> list[Limit]:
    """What a comparison must hold: what every graph must, and the divergence that was asked for, on the texts and in each part of a scenario."""
    kind = sides[1].kind
    asked = [] if max_kl is None else [Limit(kind, "mean_kl", "<=", max_kl, ASKED), Limit(kind, PART, "<=", max_kl, PARTS)]
    return [*fault_limits(kind, sides, streamed=streamed), *asked]


def measure_pair(oracle: GraphOracle, runner: Watched, limits: list[Limit], progress: Progress) -> Report:
    """Hold one graph against another.

    Args:
        oracle: the other graph, with the scenarios that both take.
        runner: the graph, loaded and told what it will be asked for.
        limits: what the two must hold.
        progress: told what is being done.

    Returns:
        The stage's entry of the report: ``passed`` is None where it was compared and not judged: no divergence was asked for.
    """
    side = runner.side
    start, measured = time.perf_counter(), StageMeasurement()
    measured.numbers |= dict.fromkeys((PART, NONFINITE))  # where the graph can't be run

    def run() -> None:
        _scenarios(oracle, runner, measured)
        if oracle.windows:
            score_text(oracle, runner, measured)
        elif side.one_position:
            measured.missing["perplexity_increase_pct"] = ONE_POSITION
        record_faults(measured, oracle.truth, runner)

    failed = run_parts(side.name, {"scenarios and perplexity": run}, measured, progress)
    checks = [*map(tolerances.failed_to_run, failed), *judged(measured, limits)]
    entry = stage_entry(side.name, side.kind, measured, checks, time.perf_counter() - start)
    return entry | {"passed": pair_verdict(checks)}


def pair_verdict(checks: list[Report]) -> bool | None:
    """Of the limits that were asked for, whatever the kind of the weights: True where divergence is within them, and nothing failed."""
    passed = {check["check"]: check["passed"] for check in checks}
    return False if False in passed.values() else True if passed.get(PART) else None


def compare_layers(theirs: Side, ours: Side, oracle: GraphOracle, progress: Progress) -> Report:
    """The report's ``layers`` of a pair: difference of every layer fed the same; or ``missing``, why not."""
    if theirs.one_position or ours.one_position:
        return {"missing": "an engine graph is held against its stage as a whole; layers are compared between stages"}
    try:
        return layer_differences(theirs.graph, ours.graph, oracle.scenarios[0].rows[0], progress).as_report()
    except FusionError as error:
        return {"missing": str(error)}


def _scenarios(oracle: GraphOracle, runner: Watched, measured: StageMeasurement) -> None:
    caches = []
    parts: Parts = []
    for scenario in oracle.scenarios:
        truth, rows = oracle.truth.run(scenario), runner.run(scenario)
        given = zip(truth, rows, strict=True)  # an engine graph gives fewer positions than its stage
        parts += parts_kl(scenario, rows, [kl_divergence(second.logits, first.gathered(second.positions).logits) for first, second in given])
        if not truth[0].keys:
            rows = [RowResult(row.positions, row.logits) for row in rows]
        seen = oracle.seen_in(scenario, truth)
        measured.scenarios.append(compare_scenario(seen, scenario, rows))
        caches += [cache_errors(seen, scenario, rows)] if rows[0].keys else []
    measured.numbers |= dict.fromkeys(TEXT_NUMBERS)
    summarise(oracle, measured)
    worst_cache(measured, caches)
    record_worst_part(measured, parts)
    measured.missing["noise_ratio"] = NO_FLOOR
