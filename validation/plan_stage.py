"""Measure a plan on the GPU: its own kernels against the reference, with the caches that they leave.

A plan gives one position a call. So the scenarios are judged at the last position of each call, and the text and the whole main sequence are run
token by token, which is what decoding does.
"""

from __future__ import annotations

import time
from typing import Any

from artifact.errors import ToolkitError
from artifact.progress import Progress
from engines.device import Device
from engines.runner import Plan
from validation import metrics, tolerances
from validation.measurement import StageMeasurement, against_floor
from validation.oracle import MAIN, Oracle
from validation.plan_runner import PlanRunner
from validation.scenario_errors import cache_errors, compare_scenario
from validation.stage import stage_entry
from validation.structure import score_text, summarise, summarise_parts, worst_cache


def measure_plan(oracle: Oracle, engine: dict[str, Any], device: Device, progress: Progress) -> dict[str, Any]:
    """Run one plan against the reference.

    Args:
        oracle: the scenarios and the reference.
        engine: the plan's entry in ``build.json``, with its folder.
        device: this machine's GPU.
        progress: told what is being done.

    Returns:
        The stage's entry of the report; a plan that can't be run is an entry that failed and says why.
    """
    start = time.perf_counter()
    stage = f"engine {engine['folder']}"
    progress(f"{stage}: on the GPU", 0, 1)
    measured, checks = StageMeasurement(), []
    try:
        _measure(oracle, PlanRunner(Plan(oracle.artifact, engine, device), oracle.config, oracle.dtype), measured)
    except ToolkitError as error:
        checks.append(tolerances.failed_to_run(str(error)))
    for row in tolerances.limits_of(tolerances.plan_kind(engine["precision"])):
        value = tolerances.gated_value(row.check, measured.numbers, oracle.scored_tokens)
        checks.append(tolerances.judge(row, value, where=measured.where.get(row.check), missing=measured.missing.get(row.check)))
    backend = f"{engine['backend']} {engine['tensorrt_version']}, {device.name}"
    return stage_entry(stage, measured, checks, time.perf_counter() - start, backend=backend)


def _measure(oracle: Oracle, runner: PlanRunner, measured: StageMeasurement) -> None:
    caches = []
    for scenario in oracle.scenarios:
        rows = runner.run(scenario)
        measured.scenarios.append(compare_scenario(oracle, scenario, rows))
        caches.append(cache_errors(oracle, scenario, rows))
    summarise(oracle, measured)
    worst_cache(measured, caches)
    summarise_parts(oracle, measured)
    main = next(scenario.rows[0] for scenario in oracle.scenarios if scenario.sequences == (MAIN,))
    errors, _ = metrics.absolute_errors(runner.logits(main), oracle.logits[MAIN])
    measured.decode_errors = errors.tolist()
    measured.numbers["mean_abs"] = float(errors.mean())
    measured.where["noise_ratio"] = "the main sequence, decoded token by token"
    against_floor(oracle, measured, "noise_ratio", float(errors.mean()))
    score_text(oracle, runner, measured)
