"""Measure one stage: every number first, the gate after it.

Letters: N layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.errors import ToolkitError
from artifact.progress import Progress
from validation import metrics, perplexity, tolerances
from validation.graph_runner import GraphRunner, RowResult, call_feeds
from validation.local_ratio import local_ratios
from validation.oracle import MAIN, Oracle
from validation.ranges import audit_ranges
from validation.scenario_errors import cache_errors, compare_scenario, own_difference
from validation.scenarios import Scenario
from validation.strict import run_strict

Array = NDArray[Any]
BACKEND = "onnxruntime-cpu"
NUMBERS = (
    "max_abs", "mean_abs", "max_abs_relative", "noise_ratio", "strict_noise_ratio", "strict_nonfinite", "worst_local_ratio", "worst_local_layer",
    "range_peak", "range_tensor", "mean_kl", "top1_agreement", "decisive_disagreements", "scenario_spread", "self_consistency", "cache_error",
    "perplexity", "perplexity_increase_pct", "perplexity_se_pct",
)  # fmt: skip
"""Keys of every stage of the report, null where not measured."""

LastRows = dict[str, list[RowResult]]
"""Scenario → per row, the logits of each call's last position."""


@dataclass
class StageMeasurement:
    """The numbers of one stage, as they are gathered.

    Attributes:
        numbers: key of ``NUMBERS`` → value.
        where: check → layer, tensor or node that it is about.
        missing: check → why it has no value.
        seconds: part → how long it took.
        last_rows: logits that an engine graph must give too.
    """

    numbers: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(NUMBERS))
    scenarios: list[dict[str, Any]] = field(default_factory=list)
    local_ratios: list[float] | None = None
    decode_errors: list[float] | None = None
    where: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    last_rows: LastRows = field(default_factory=dict)


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
    for row in tolerances.limits_of(kind, has_floor=oracle.floor.mean_abs is not None):
        value = tolerances.gated_value(row.check, measured.numbers, oracle.scored_tokens)
        checks.append(tolerances.judge(row, value, where=measured.where.get(row.check), missing=measured.missing.get(row.check)))
    return stage_entry(stage, measured, checks, time.perf_counter() - start), measured.last_rows


def stage_entry(stage: str, measured: StageMeasurement, checks: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One entry of the report's ``stages``."""
    return {
        "stage": stage,
        "backend": BACKEND,
        **measured.numbers,
        "passed": tolerances.verdict(checks),
        "seconds": round(seconds, 2),
        "seconds_by_part": measured.seconds,
        "checks": checks,
        "warnings": measured.warnings,
        "scenarios": measured.scenarios,
        "local_ratios": measured.local_ratios,
        "decode_errors": measured.decode_errors,
    }


def _measure(oracle: Oracle, graph: Path, measured: StageMeasurement, progress: Progress) -> list[str]:
    """What the artifact's dtype asks for, quantised stages too; a graph that breaks the contract says nothing true after that.

    Returns:
        What could not be run, and why; empty where all was.
    """
    parts = {"scenarios and perplexity": measure_structure}
    if oracle.dtype == "fp16":
        parts |= {"strict mode": measure_strict, "range audit": measure_ranges, "local ratios": measure_local}
    else:
        measured.missing |= dict.fromkeys(("strict_nonfinite", "range_peak"), "an fp32 artifact")
    for number, (name, part) in enumerate(parts.items()):
        progress(f"{graph.stem}: {name}", number, len(parts))
        start = time.perf_counter()
        try:
            part(oracle, graph, measured)
        except ToolkitError as error:
            return [str(error)]
        measured.seconds[name] = round(time.perf_counter() - start, 2)
    return []


def measure_structure(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """The four scenarios and the perplexity, the whole graph in ONNX Runtime."""
    runner = GraphRunner(graph, oracle.config, oracle.dtype)
    caches, drifts = [], [0.0]
    prefill: RowResult | None = None
    for scenario in oracle.scenarios:
        rows = runner.run(scenario)
        if prefill is None:
            prefill = rows[0].without_caches()
        else:
            drifts.append(own_difference(scenario, rows[0], prefill))
        measured.scenarios.append(compare_scenario(oracle, scenario, rows))
        caches.append(cache_errors(oracle, scenario, rows))
        measured.last_rows[scenario.name] = last_rows(scenario, rows)
        if scenario.name == "decode":
            errors, _ = metrics.absolute_errors(rows[0].logits, oracle.logits[MAIN])
            measured.decode_errors = errors[scenario.chunks[0] :].tolist()
    _summarise(oracle, measured, np.stack(caches))
    _against_floor(oracle, measured, "self_consistency", float(np.max(drifts)))
    measured.where["self_consistency"] = oracle.scenarios[int(np.argmax(drifts))].name
    _score_text(oracle, runner, measured)


def last_rows(scenario: Scenario, rows: list[RowResult]) -> list[RowResult]:
    """What an engine graph gives of a scenario: the last position of each call."""
    return [row.gathered(scenario.last_positions(index)) for index, row in enumerate(rows)]


def measure_strict(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Prefill with every operation rounded to float16."""
    result = run_strict(graph, _prefill_feeds(oracle))
    mean, _ = metrics.absolute_errors(result.outputs["logits"][0], oracle.logits[MAIN])
    _against_floor(oracle, measured, "strict_noise_ratio", float(mean.mean()))
    measured.numbers["strict_nonfinite"] = result.nonfinite
    if result.first_nonfinite is not None:
        measured.where["strict_nonfinite"] = result.first_nonfinite
        measured.numbers["strict_noise_ratio"] = float("nan")
        measured.where["strict_noise_ratio"] = result.first_nonfinite


def measure_ranges(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Largest value of every float16 tensor, prefill in float32."""
    audit = audit_ranges(graph, _prefill_feeds(oracle))
    measured.numbers |= {"range_peak": audit.peak_fraction, "range_tensor": audit.tensor}
    measured.where["range_peak"] = audit.tensor
    measured.warnings += audit.warnings


def measure_local(oracle: Oracle, graph: Path, measured: StageMeasurement) -> None:
    """Error that each layer adds to the reference's hidden state."""
    hidden = oracle.runs[MAIN].hidden
    assert hidden is not None
    ratios = local_ratios(graph, hidden, oracle.float16_errors)
    if ratios is None:
        measured.missing["worst_local_ratio"] = "not a float16 graph"
        return
    worst = int(np.argmax(ratios))
    measured.local_ratios = ratios
    measured.numbers |= {"worst_local_ratio": ratios[worst], "worst_local_layer": worst}
    measured.where["worst_local_ratio"] = f"layer {worst}"


def _summarise(oracle: Oracle, measured: StageMeasurement, caches: NDArray[np.float64]) -> None:
    """Numbers of the stage from those of its scenarios; ``caches`` is [scenarios, N, 2]."""
    columns = {key: np.asarray([entry[key] for entry in measured.scenarios], float) for key in ("max_abs", "mean_abs", "mean_kl", "top1_agreement")}
    worst = int(np.argmax(columns["mean_abs"]))  # of NaN and numbers, NaN
    numbers = {
        "max_abs": float(columns["max_abs"].max()),
        "mean_abs": float(columns["mean_abs"][worst]),
        "max_abs_relative": float(columns["max_abs"].max()) / oracle.largest_logit,
        "mean_kl": float(columns["mean_kl"].max()),
        "top1_agreement": float(columns["top1_agreement"].min()),
        "scenario_spread": float(columns["mean_abs"][worst]) / float(columns["mean_abs"][0]) if columns["mean_abs"][0] else None,
    }
    measured.numbers |= numbers
    _against_floor(oracle, measured, "noise_ratio", numbers["mean_abs"] or 0.0)
    for check in ("noise_ratio", "scenario_spread"):
        measured.where[check] = measured.scenarios[worst]["scenario"]
    measured.where["max_abs_relative"] = measured.scenarios[int(np.argmax(columns["max_abs"]))]["scenario"]
    _decisive(measured)
    scenario, layer, kind = np.unravel_index(int(np.argmax(caches)), caches.shape)
    measured.numbers["cache_error"] = float(caches[scenario, layer, kind])
    measured.where["cache_error"] = f"layer {layer} {('keys', 'values')[kind]}, {measured.scenarios[scenario]['scenario']}"


def _decisive(measured: StageMeasurement) -> None:
    counts = {entry["scenario"]: entry["decisive_disagreements"] for entry in measured.scenarios}
    if None in counts.values():
        measured.missing["decisive_disagreements"] = "there is no floor to say which positions are decisive"
        return
    measured.numbers["decisive_disagreements"] = sum(counts.values())
    if any(counts.values()):
        measured.where["decisive_disagreements"] = ", ".join(name for name, count in counts.items() if count)


def _against_floor(oracle: Oracle, measured: StageMeasurement, check: str, mean_abs: float) -> None:
    if oracle.floor.mean_abs is None:
        measured.missing[check] = f"no floor: {oracle.floor.reason}"
    elif oracle.floor.mean_abs == 0:
        measured.missing[check] = "the floor is 0: float16 changes nothing on these tokens"
    else:
        measured.numbers[check] = mean_abs / oracle.floor.mean_abs


def _score_text(oracle: Oracle, runner: GraphRunner, measured: StageMeasurement) -> None:
    if oracle.reference_scores is None:
        measured.missing["perplexity_increase_pct"] = f"perplexity is not applicable: {oracle.tokens.kind}"
        return
    scores = perplexity.score(oracle.windows, lambda index: runner.logits(oracle.windows[index].inputs), oracle.window_logits)
    assert scores.kl is not None
    if reason := tolerances.too_few_tokens(oracle.scored_tokens):
        measured.missing["perplexity_increase_pct"] = reason
    increase, standard_error = perplexity.increase_pct(scores, oracle.reference_scores)
    measured.numbers |= {
        "mean_kl": float(scores.kl.mean()),
        "perplexity": scores.perplexity,
        "perplexity_increase_pct": increase,
        "perplexity_se_pct": standard_error,
    }


def _prefill_feeds(oracle: Oracle) -> dict[str, Array]:
    prefill = oracle.scenarios[0]
    return call_feeds(oracle.config, oracle.dtype, next(prefill.calls()))
