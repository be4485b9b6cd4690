"""An engine graph against its stage: the same numbers at the gathered position, and the graph that the stage gives when it is gathered again.

What is built is what was checked: the engine graph is measured too, and not taken on trust from the stage that it was cut from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from artifact.engine_names import stage_of
from artifact.errors import ToolkitError
from artifact.progress import Progress
from engines.engine_graph import gather_last_position
from graphs.diff import compare_graphs, moved_weights
from validation import metrics, tolerances
from validation.measurement import ArtifactRunner, LastRows, StageMeasurement, record_join, run_scenario
from validation.oracle import Oracle
from validation.row_result import RowResult
from validation.scenario_errors import compare_scenario
from validation.scenarios import Scenario
from validation.stage import stage_entry
from validation.structure import last_rows

SCENARIOS = ("prefill", "chunked", "padded")
"""The 64 decode steps are left out: padded has 8 of its own."""


def measure_engine_graph(oracle: Oracle, stage: str, expected: LastRows | None, progress: Progress) -> dict[str, Any]:
    """Run an engine graph, and compare it with its stage in numbers and in structure.

    Args:
        oracle: the scenarios and the reference.
        stage: ``fused-engine``.
        expected: what its stage gave; None runs the stage for it.
        progress: told what is being done.

    Returns:
        The entry of the report; a graph that can't be run is an entry that failed and says why.
    """
    start = time.perf_counter()
    progress(f"{stage}: against its stage", 0, 1)
    measured = StageMeasurement()
    numbers: dict[str, float] = {}
    checks = []
    graph, base = (oracle.artifact / f"{name}.onnx" for name in (stage, stage_of(stage)))
    try:
        if (difference := _compare_numbers(oracle, graph, expected or _run_stage(oracle, base, progress), measured, progress)) is not None:
            numbers["engine_difference"] = difference
        different = structural_difference(graph, base)
        numbers["engine_structure"] = len(different)
        if different:
            measured.where["engine_structure"] = different[0]
    except ToolkitError as error:
        checks.append(tolerances.failed_to_run(str(error)))
    rows = tolerances.limits_of("engine", kv_cache=oracle.kv_cache, streamed=oracle.residency.streamed)
    found = measured.numbers | numbers
    checks += [
        tolerances.judge(row, found.get(row.check), where=measured.where.get(row.check), missing=measured.missing.get(row.check)) for row in rows
    ]
    kind = tolerances.entry_kind(stage, oracle.dtype)
    assert kind is not None, stage
    entry = stage_entry(stage, kind, measured, checks, time.perf_counter() - start)
    return entry | {"engine_difference": numbers.get("engine_difference")}


def structural_difference(engine: Path, base: Path) -> list[str]:
    """What differs from the stage with its last position gathered: outputs, nodes, and weights that are read from another place.

    Raises:
        EngineError: the stage's logits do not come from one MatMul.
    """
    expected, actual = ir.load(base), ir.load(engine)
    gather_last_position(expected.graph, base.name)
    difference = compare_graphs(expected, actual)
    outputs = [f"output {name}" for name in difference.outputs]
    weights = [f"weight {name}" for name in moved_weights(expected.graph, actual.graph)]
    return [*outputs, *difference.only_left, *difference.only_right, *weights]


def _run_stage(oracle: Oracle, base: Path, progress: Progress) -> LastRows:
    runner = oracle.runner(base, progress=progress)
    scenarios = [scenario for scenario in oracle.scenarios if scenario.name in SCENARIOS]
    runner.expect(scenarios, (), oracle.capacity)
    return {scenario.name: last_rows(scenario, runner.run(scenario, oracle.capacity)) for scenario in scenarios}


def _fitting(oracle: Oracle, runner: ArtifactRunner, measured: StageMeasurement) -> list[Scenario]:
    """The scenarios, without those that need more slots than a static cache was built with."""
    scenarios = [scenario for scenario in oracle.scenarios if scenario.name in SCENARIOS]
    fitting = [scenario for scenario in scenarios if runner.capacity is None or scenario.width <= runner.capacity]
    if left_out := ", ".join(scenario.name for scenario in scenarios if scenario not in fitting):
        reason = f"built for {runner.capacity} slots, too few for {left_out}"
        measured.warnings.append(f"not run on all scenarios: {reason}")
        measured.missing["engine_difference"] = measured.missing["stray_slots"] = reason
    return fitting


def _compare_numbers(oracle: Oracle, graph: Path, expected: LastRows, measured: StageMeasurement, progress: Progress) -> float | None:
    """Largest difference from the stage ÷ its largest logit, None where no scenario fits; the errors against the reference go into ``measured``.

    Top-1 is against the stage: an engine graph has a handful of positions, too few for a share against the reference to mean anything.
    """
    runner = oracle.runner(graph, one_position=True, progress=progress)
    record_join(measured, runner)
    scenarios = _fitting(oracle, runner, measured)
    if not scenarios:
        return None
    runner.expect(scenarios, (), oracle.capacity)
    worst, same = [], []
    for scenario in scenarios:
        results = run_scenario(oracle, measured, runner, scenario)
        measured.scenarios.append(compare_scenario(oracle, scenario, results))
        pairs = list(zip(results, expected[scenario.name], strict=True))
        worst += [_difference(ours, theirs) for ours, theirs in pairs]
        same += [ours.logits.argmax(axis=-1) == theirs.logits.argmax(axis=-1) for ours, theirs in pairs]
    for key, pick in (("max_abs", np.max), ("mean_abs", np.max), ("mean_kl", np.max)):
        measured.numbers[key] = float(pick([entry[key] for entry in measured.scenarios]))
    measured.numbers["top1_agreement"] = float(np.concatenate(same).mean())
    at = int(np.argmax(worst))
    rows_of = [scenario.name for scenario in scenarios for _ in scenario.rows]
    measured.where["engine_difference"] = rows_of[at]
    return worst[at]


def _difference(engine: RowResult, stage: RowResult) -> float:
    """Largest |engine − stage| at the engine's positions ÷ largest |logit| of the stage there."""
    assert np.array_equal(engine.positions, stage.positions)
    _, largest = metrics.absolute_errors(engine.logits, stage.logits)
    return float(largest.max()) / float(np.abs(stage.logits.astype(np.float32)).max())
