"""An engine graph against its stage: the same numbers at the gathered position, and the graph that the stage gives when it is gathered again.

One whose decode adds up in another order (``engines/decode_gemv.py``) rounds otherwise: it must be as near to the reference as its stage is.

What is built is what was checked: the engine graph is measured too, and not taken on trust from the stage that it was cut from.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.engine_names import has_gemv, stage_of
from artifact.errors import ToolkitError
from artifact.progress import Progress
from engines.decode_gemv import add_gemv
from engines.one_position import gather_last_position
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
        numbers |= _compare_numbers(oracle, graph, expected or _run_stage(oracle, base, progress), measured, progress)
        different = structural_difference(graph, base)
        numbers["engine_structure"] = len(different)
        if different:
            measured.where["engine_structure"] = different[0]
    except ToolkitError as error:
        checks.append(tolerances.failed_to_run(str(error)))
    kind = tolerances.entry_kind(stage, oracle.dtype)
    judged_by = tolerances.kind_of(stage, oracle.dtype)
    assert kind is not None, stage
    assert judged_by is not None, stage
    rows = tolerances.limits_of(judged_by, kv_cache=oracle.kv_cache, streamed=oracle.residency.streamed)
    found = measured.numbers | numbers
    checks += [
        tolerances.judge(row, found.get(row.check), where=measured.where.get(row.check), missing=measured.missing.get(row.check)) for row in rows
    ]
    entry = stage_entry(stage, kind, measured, checks, time.perf_counter() - start)
    return entry | {"engine_difference": numbers.get("engine_difference")}


def structural_difference(engine: Path, base: Path) -> list[str]:
    """What differs from the stage with its last position gathered, and decode in the engine's form.

    Returns:
        Outputs, nodes, and weights that are read from another place.

    Raises:
        EngineError: the stage's logits do not come from one MatMul.
    """
    expected, actual = ir.load(base), ir.load(engine)
    gather_last_position(expected.graph, base.name, early=base.stem.endswith(tolerances.FOR_ONNXRUNTIME))
    if has_gemv(engine.stem):
        add_gemv(expected.graph, base.name)
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
        measured.missing |= dict.fromkeys(("engine_difference", "engine_noise_ratio", "stray_slots"), reason)
    return fitting


def _compare_numbers(oracle: Oracle, graph: Path, expected: LastRows, measured: StageMeasurement, progress: Progress) -> dict[str, float]:
    """``engine_difference``, the largest difference from the stage ÷ its largest logit, and ``engine_noise_ratio``, its mean error ÷ the stage's.

    Both are left out where no scenario fits. The errors against the reference go into ``measured``.

    Top-1 is against the stage: an engine graph has a handful of positions, too few for a share against the reference to mean anything.
    """
    runner = oracle.runner(graph, one_position=True, progress=progress)
    record_join(measured, runner)
    scenarios = _fitting(oracle, runner, measured)
    if not scenarios:
        return {}
    runner.expect(scenarios, (), oracle.capacity)
    worst, same, errors = [], [], []
    for scenario in scenarios:
        results = run_scenario(oracle, measured, runner, scenario)
        measured.scenarios.append(compare_scenario(oracle, scenario, results))
        pairs = list(zip(results, expected[scenario.name], strict=True))
        worst += [_difference(ours, theirs) for ours, theirs in pairs]
        same += [ours.logits.argmax(axis=-1) == theirs.logits.argmax(axis=-1) for ours, theirs in pairs]
        errors += [_mean_errors(oracle, sequence, pair) for sequence, pair in zip(scenario.sequences, pairs, strict=True)]
    for key, pick in (("max_abs", np.max), ("mean_abs", np.max), ("mean_kl", np.max)):
        measured.numbers[key] = float(pick([entry[key] for entry in measured.scenarios]))
    measured.numbers["top1_agreement"] = float(np.concatenate(same).mean())
    at = int(np.argmax(worst))
    rows_of = [scenario.name for scenario in scenarios for _ in scenario.rows]
    measured.where["engine_difference"] = rows_of[at]
    engine_error, stage_error = np.concatenate(errors, axis=1).mean(axis=1)
    return {"engine_difference": worst[at], "engine_noise_ratio": float(engine_error / stage_error)}


def _mean_errors(oracle: Oracle, sequence: int, pair: tuple[RowResult, RowResult]) -> NDArray[np.float64]:
    """Mean |logit − reference| of the engine's positions, by the engine and by its stage [2, L]."""
    return np.stack([metrics.absolute_errors(row.logits, oracle.logits[sequence][row.positions])[0] for row in pair])


def _difference(engine: RowResult, stage: RowResult) -> float:
    """Largest |engine − stage| at the engine's positions ÷ largest |logit| of the stage there."""
    assert np.array_equal(engine.positions, stage.positions)
    _, largest = metrics.absolute_errors(engine.logits, stage.logits)
    return float(largest.max()) / float(np.abs(stage.logits.astype(np.float32)).max())
