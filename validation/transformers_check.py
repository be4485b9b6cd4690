"""Whether the reference that judges everything is itself right: held against Hugging Face's own Llama in float32, on the same weights and tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import takewhile
from math import isfinite
from typing import Any

import numpy as np

from artifact.errors import ToolkitError
from artifact.steps import StepContext
from validation import tolerances
from validation.limit_rows import rows
from validation.measurement import StageMeasurement
from validation.oracle import MAIN, Oracle
from validation.reference import as_is
from validation.scenarios import Scenario
from validation.spill import Spill
from validation.stage import judged, stage_entry
from validation.structure import measure_scenarios, sequences_of
from validation.transformers_model import PACKAGE, TransformersModel
from validation.transformers_runner import TransformersRunner

HIDDEN = "hidden_error"
STEPS = 8
"""Decode steps that are run: they prove the cache, and each reads a whole layer, which at 13B takes longer than a prefill."""


def check_reference(step: StepContext, oracle: Oracle, model: TransformersModel) -> dict[str, Any]:
    """Run transformers' Llama over the scenarios and the text, and compare the reference with it.

    Args:
        step: the artifact; what is kept of every layer lies on its disk where graphs are streamed.
        oracle: the reference's runs.
        model: theirs, of the checkpoint whose weights both take.

    Returns:
        The report's ``against``: kind, name, config, weights, passed and entry, whose numbers are those of a stage.
    """
    start = time.perf_counter()
    hidden = oracle.runs[MAIN].hidden
    assert hidden is not None
    store = Spill(step.artifact).keep if oracle.residency.streamed else as_is
    measured, runner = StageMeasurement(), TransformersRunner(model, store=store, progress=step.progress)
    checks = []
    scenarios = [shortened(scenario) for scenario in oracle.scenarios]
    try:
        runner.expect(scenarios, sequences_of(oracle), hidden)
        measure_scenarios(oracle, runner, scenarios, measured)
    except ToolkitError as error:
        checks.append(tolerances.failed_to_run(str(error)))
    _record_hidden(measured, runner.hidden_errors)
    checks += judged(measured, tolerances.limits_of("oracle"))
    entry = stage_entry(PACKAGE, "oracle", measured, checks, time.perf_counter() - start, backend=model.name)
    said = {"kind": PACKAGE, "name": model.name, "config": model.config_source, "weights": model.weights_source}
    return said | {"passed": entry["passed"], "entry": entry}


def reference_rows(against: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The limits of the comparison, for the report; none where it was not made."""
    return rows(PACKAGE, tolerances.limits_of("oracle")) if against else []


def shortened(scenario: Scenario) -> Scenario:
    """The scenario with ``STEPS`` of its last calls of one token, its rows that much shorter."""
    steps = len(list(takewhile(lambda size: size == 1, reversed(scenario.chunks))))
    if (spare := steps - STEPS) <= 0:
        return scenario
    return replace(scenario, rows=tuple(row[:-spare] for row in scenario.rows), chunks=scenario.chunks[:-spare])


def _record_hidden(measured: StageMeasurement, errors: list[float]) -> None:
    """The worst layer's error, and the first layer beyond the limit: where the two part."""
    measured.numbers[HIDDEN] = None
    if not errors:
        return
    measured.hidden_errors = errors
    worst = int(np.argmax(errors))  # of NaN and numbers, NaN
    limit = next(row.limit for row in tolerances.limits_of("oracle") if row.check == HIDDEN)
    beyond = [layer for layer, error in enumerate(errors) if not (isfinite(error) and error <= limit)]
    measured.numbers |= {HIDDEN: errors[worst], "first_layer_outside": beyond[0] if beyond else None}
    measured.where[HIDDEN] = f"layer {worst}" + (f"; the first beyond is layer {beyond[0]}" if beyond and beyond[0] != worst else "")
