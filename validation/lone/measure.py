"""Measure a lone graph: what ``stage`` measures of an artifact's graph, as far as the graph lets itself be asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from artifact.progress import Progress
from validation import metrics, tolerances
from validation.calls import left_padded
from validation.drift import name_first_layer
from validation.lone.graph import LoneGraph
from validation.lone.limits import Plan
from validation.lone.runner import LoneRunner, lone_feeds
from validation.measurement import StageMeasurement, against_floor
from validation.oracle import MAIN, Oracle
from validation.ranges import audit_ranges
from validation.stage import judged, measure_local, record_ranges, run_parts, stage_entry
from validation.strict import run_strict
from validation.structure import ONE_POSITION, measure_scenarios

STRICT_CHECKS = ("strict_noise_ratio", "strict_nonfinite", "range_peak")
LOCAL = "worst_local_ratio"
FLOAT32 = "caches and logits are float32: there is no rounding to float16 to measure"
UNCUT = "its nodes don't say which layer they belong to, so no layer can be run alone"


def measure_graph(oracle: Oracle, graph: LoneGraph, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Run a graph against the reference.

    Returns:
        The entry of the report's ``stages``, named after the file; a graph that can't be run is an entry that failed and says why.
    """
    start = time.perf_counter()
    measured = StageMeasurement()
    failed = run_parts(graph.path.name, _parts(oracle, graph, plan, measured), measured, progress)
    checks = [tolerances.failed_to_run(message) for message in failed]
    checks += judged(measured, tolerances.limits_of(graph.precision.kind, has_floor=oracle.floor.mean_abs is not None))
    name_first_layer(measured, checks)
    return stage_entry(graph.path.name, graph.precision.kind, measured, checks, time.perf_counter() - start)


def _parts(oracle: Oracle, graph: LoneGraph, plan: Plan, measured: StageMeasurement) -> dict[str, Callable[[], None]]:
    """What this graph's precision asks for; what it leaves out is missing, with the reason."""
    parts: dict[str, Callable[[], None]] = {
        "scenarios and perplexity": lambda: measure_scenarios(oracle, LoneRunner(graph, oracle.config), plan.scenarios, measured)
    }
    if graph.precision.activations == "float32":
        measured.missing |= dict.fromkeys((*STRICT_CHECKS, LOCAL), FLOAT32)
        return parts
    parts |= {"strict mode": lambda: _measure_strict(oracle, graph, measured), "range audit": lambda: _measure_ranges(oracle, graph, measured)}
    if graph.names_layers:
        return parts | {"local ratios": lambda: measure_local(oracle, graph.path, measured)}
    measured.missing[LOCAL] = UNCUT
    return parts


def _measure_strict(oracle: Oracle, graph: LoneGraph, measured: StageMeasurement) -> None:
    """Prefill with every operation rounded to the dtype that the graph gives it."""
    result = run_strict(graph.model, _prefill_feeds(oracle, graph))
    measured.numbers["strict_nonfinite"] = result.nonfinite
    if result.first_nonfinite is not None:
        measured.where |= dict.fromkeys(("strict_nonfinite", "strict_noise_ratio"), result.first_nonfinite)
    if graph.one_position:
        measured.missing["strict_noise_ratio"] = ONE_POSITION
        return
    mean, _ = metrics.absolute_errors(result.outputs[graph.ports.logits.name][0], oracle.logits[MAIN])
    against_floor(oracle, measured, "strict_noise_ratio", float("nan") if result.nonfinite else float(mean.mean()))


def _measure_ranges(oracle: Oracle, graph: LoneGraph, measured: StageMeasurement) -> None:
    """Largest value of every float16 tensor, prefill in float32."""
    record_ranges(audit_ranges(graph.model, _prefill_feeds(oracle, graph)), measured)


def _prefill_feeds(oracle: Oracle, graph: LoneGraph) -> dict[str, Any]:
    return lone_feeds(graph.ports, oracle.config, next(left_padded(oracle.scenarios[0].turns())), [])
