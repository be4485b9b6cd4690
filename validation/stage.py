"""Measure one stage: every number first, the gate after it.

Letters: N layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import FusionError, ToolkitError
from artifact.progress import Progress
from graphs.partition import hidden_states
from validation import metrics, tolerances
from validation.calls import FORMS
from validation.drift import name_first_layer
from validation.float16_costs import relative_errors
from validation.graph_runner import call_feeds, filled_caches
from validation.local_ratio import as_ratios, layer_errors
from validation.measurement import LastRows, StageMeasurement, against_floor
from validation.op_errors import op_errors
from validation.oracle import MAIN, Oracle
from validation.ranges import RangeAudit, audit_ranges
from validation.strict import run_strict
from validation.structure import measure_structure

Array = NDArray[Any]
BACKEND = "onnxruntime-cpu"


def measure_stage(oracle: Oracle, stage: str, progress: Progress) -> tuple[dict[str, Any], LastRows]:
    """Run one graph against the reference.

    Returns:
        The stage's entry of the report (a graph that can't be run is an entry that failed and says why), and what its engine graph must
        give.
    """
    start = time.perf_counter()
    graph = oracle.artifact / f"{stage}.onnx"
    kind = tolerances.kind_of(stage, oracle.dtype)
    assert kind is not None, stage
    measured = StageMeasurement()
    checks = [tolerances.failed_to_run(message) for message in _measure(oracle, graph, measured, progress)]
    checks += judged(
        measured,
        tolerances.limits_of(kind, has_floor=oracle.floor.mean_abs is not None, kv_cache=oracle.kv_cache, streamed=oracle.residency.streamed),
    )
    name_first_layer(measured, checks)
    return stage_entry(stage, kind, measured, checks, time.perf_counter() - start), measured.last_rows


def judged(measured: StageMeasurement, limits: list[tolerances.Limit]) -> list[dict[str, Any]]:
    """The checks of what was measured, one a limit."""
    texts = measured.quality["texts"] if measured.quality else ()
    values = [(row, *tolerances.gated_value(row.check, measured.numbers, texts)) for row in limits]
    checks = [
        tolerances.judge(row, value, where=text or measured.where.get(row.check), missing=measured.missing.get(row.check))
        for row, value, text in values
    ]
    return [check | _run_of_ranges(check, measured) for check in checks]


def _run_of_ranges(check: dict[str, Any], measured: StageMeasurement) -> dict[str, str]:
    """The reason of a range that was measured names the run that it is of."""
    run = measured.numbers.get("range_run")
    return {"reason": f"{check['reason']}; of the {run} run"} if check["check"] == "range_peak" and run else {}


def run_parts(name: str, parts: Mapping[str, Callable[[], None]], measured: StageMeasurement, progress: Progress) -> list[str]:
    """Carry out parts in turn, and time them; a part that can't be run is the last: nothing after that says anything true.

    Returns:
        What could not be run, and why; empty where all was.
    """
    for number, (part, measure) in enumerate(parts.items()):
        progress(f"{name}: {part}", number, len(parts))
        start = time.perf_counter()
        try:
            measure()
        except ToolkitError as error:
            return [str(error)]
        measured.seconds[part] = round(time.perf_counter() - start, 2)
    return []


def stage_entry(
    stage: str, kind: tolerances.Kind, measured: StageMeasurement, checks: list[dict[str, Any]], seconds: float, *, backend: str = BACKEND
) -> dict[str, Any]:
    """One entry of the report's ``stages``; ``kind`` is that of its weights: int4 is never said to have passed."""
    return {
        "stage": stage,
        "backend": backend,
        **measured.numbers,
        "passed": tolerances.verdict(checks, kind),
        "seconds": round(seconds, 2),
        "seconds_by_part": measured.seconds,
        "checks": checks,
        "warnings": measured.warnings,
        "scenarios": measured.scenarios,
        "local_ratios": measured.local_ratios,
        "hidden_errors": measured.hidden_errors,
        "op_errors": measured.op_errors,
        "decode_errors": measured.decode_errors,
        "quality": measured.quality,
    }


def _measure(oracle: Oracle, graph: Path, measured: StageMeasurement, progress: Progress) -> list[str]:
    """What the artifact's dtype asks for, quantised stages too; what could not be run, and why."""
    parts: dict[str, Callable[[Oracle, Path, StageMeasurement], None]] = {"scenarios and perplexity": partial(measure_structure, progress=progress)}
    if oracle.dtype == "fp16":
        parts |= {"strict mode": measure_strict, "range audit": measure_ranges, "local ratios": measure_local}
    else:
        measured.missing |= dict.fromkeys(("strict_nonfinite", "range_peak"), "an fp32 artifact")
    return run_parts(graph.stem, {name: partial(part, oracle, graph, measured) for name, part in parts.items()}, measured, progress)


def measure_strict(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Prefill with every operation rounded to float16: its logits, and the hidden state after each layer."""
    model = ir.load(graph)
    hidden = _hidden_names(model)
    result = run_strict(model, _prefill_feeds(oracle), keep=hidden)
    exact = oracle.runs[MAIN].hidden
    assert exact is not None
    if len(hidden) == len(exact) - 1:
        measured.hidden_errors = relative_errors([result.outputs[name][0] for name in hidden], exact[1:])
    mean, _ = metrics.absolute_errors(result.outputs["logits"][0], oracle.logits[MAIN])
    against_floor(oracle, measured, "strict_noise_ratio", float(mean.mean()))
    measured.rounded_ranges = result.ranges
    measured.numbers["strict_nonfinite"] = result.nonfinite
    if result.first_nonfinite is not None:
        measured.where["strict_nonfinite"] = result.first_nonfinite
        measured.numbers["strict_noise_ratio"] = float("nan")
        measured.where["strict_noise_ratio"] = result.first_nonfinite


def _hidden_names(model: ir.Model) -> list[str]:
    try:
        return hidden_states(model)
    except FusionError:
        return []  # measure_local cuts the same graph, and says why it can't


def measure_ranges(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Largest value of every float16 tensor, prefill: of the strict run where it may stand for a float32 run, else of that."""
    rounded = measured.rounded_ranges
    kind = tolerances.kind_of(graph.stem, oracle.dtype)
    assert kind is not None, graph
    limits = tolerances.limits_of(kind, has_floor=oracle.floor.mean_abs is not None, kv_cache=oracle.kv_cache, streamed=oracle.residency.streamed)
    if rounded is not None and rounded.is_far and is_held_to_noise(measured, limits):
        record_ranges(rounded, measured, "strict")
    else:
        record_ranges(audit_ranges(graph, _prefill_feeds(oracle)), measured)


def is_held_to_noise(measured: StageMeasurement, limits: list[tolerances.Limit]) -> bool:
    """Whether the strict run's noise is judged for this kind, and passed: only then it can't have strayed from what a float32 run would hold."""
    rows = [row for row in limits if row.check == "strict_noise_ratio"]
    return any(check["passed"] is True for check in judged(measured, rows))


def record_ranges(audit: RangeAudit, measured: StageMeasurement, run: str = "float32") -> None:
    """The numbers and warnings of an audit, and which run they are of."""
    measured.numbers |= {"range_peak": audit.peak_fraction, "range_tensor": audit.tensor, "range_run": run}
    measured.where["range_peak"] = audit.tensor
    measured.warnings += audit.warnings


def measure_local(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Error that each layer adds to the reference's hidden state."""
    hidden = oracle.runs[MAIN].hidden
    assert hidden is not None
    errors = measured.layer_errors or layer_errors(graph, hidden)
    if errors is None:
        measured.missing["worst_local_ratio"] = "not a float16 graph"
        return
    ratios = as_ratios(errors, oracle.float16_errors)
    worst = int(np.argmax(ratios))
    measured.local_ratios = ratios
    measured.numbers |= {"worst_local_ratio": ratios[worst], "worst_local_layer": worst}
    measured.where["worst_local_ratio"] = f"layer {worst}"
    measured.op_errors = op_errors(graph, worst, hidden[worst])


def _prefill_feeds(oracle: Oracle) -> dict[str, Array]:
    (call,) = FORMS[oracle.kv_cache].calls(oracle.scenarios[0].turns())
    length = oracle.capacity if oracle.kv_cache == "static" else 0
    return call_feeds(oracle.config, oracle.dtype, call, filled_caches(oracle.config, oracle.dtype, 1, length))
