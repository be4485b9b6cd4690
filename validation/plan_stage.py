"""Measure a plan on the GPU: its own kernels against the reference, with the caches that they leave.

A plan gives one position a call. So the scenarios are judged at the last position of each call, and the text and the whole main sequence are run
token by token, which is what decoding does. What a plan was not built for, in rows or in positions, is left out, and said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from artifact.errors import ToolkitError
from artifact.progress import Progress
from engines.device import Device
from engines.plan import open_engine
from validation import metrics, tolerances
from validation.limit_rows import plan_stage
from validation.measurement import StageMeasurement, against_floor
from validation.oracle import MAIN, Oracle
from validation.plan_runner import PlanRunner, token_by_token
from validation.scenario_errors import cache_errors, compare_scenario
from validation.scenarios import Scenario
from validation.stage import judged, stage_entry
from validation.structure import score_text, summarise, summarise_parts, worst_cache

ALL_CHECKS = ("noise_ratio", "decode_noise_ratio", "max_abs_relative", "cache_error", "decisive_disagreements", *tolerances.TEXT_CHECKS)
DECODED, TEXT_WINDOWS = "the main sequence, decoded token by token", "the text's windows"
NOT_FILLED = "a plan's cache can't be filled beforehand, so a slot that was never written can't be told from one that was"


def measure_plan(oracle: Oracle, engine: dict[str, Any], device: Device, progress: Progress) -> dict[str, Any]:
    """Run one plan against the reference.

    Args:
        oracle: the scenarios and the reference.
        engine: the plan's entry in ``build.json``, with its folder; of an engine in parts the first's, with all in ``plans``.
        device: this machine's GPU.
        progress: told what is being done.

    Returns:
        The stage's entry of the report; a plan that can't be run is an entry that failed and says why.

    Raises:
        ValidationError: there are no limits for the plan's precision.
    """
    start, kind = time.perf_counter(), tolerances.plan_kind(engine["precision"])
    stage = plan_stage(engine)
    progress(f"{stage}: on the GPU", 0, 1)
    measured, checks = StageMeasurement(), []
    try:
        _measure(oracle, PlanRunner(open_engine(oracle.artifact, engine.get("plans", [engine]), device), oracle.config, oracle.dtype), measured)
    except ToolkitError as error:
        checks.append(tolerances.failed_to_run(str(error)))
    checks += judged(measured, tolerances.limits_of(kind, kv_cache=oracle.kv_cache))
    return stage_entry(stage, kind, measured, checks, time.perf_counter() - start, backend=backend_of(engine, device))


def backend_of(engine: Mapping[str, Any], device: Device) -> str:
    """What ran a plan: ``tensorrt-rtx 1.7.1.116, NVIDIA A100-SXM4-80GB``."""
    return f"{engine['backend']} {engine['tensorrt_version']}, {device.name}"


def _measure(oracle: Oracle, runner: PlanRunner, measured: StageMeasurement) -> None:
    if runner.capacity:
        measured.numbers["cache_capacity"] = runner.capacity
        measured.missing["stray_slots"] = NOT_FILLED
    scenarios = fitting(oracle.scenarios, runner, measured, ALL_CHECKS)
    if not scenarios:
        return
    _run_scenarios(oracle, runner, scenarios, measured)
    main = token_by_token(next(scenario.rows[0] for scenario in oracle.scenarios if scenario.sequences == (MAIN,)))
    if admitted(runner, [main], DECODED, ("decode_noise_ratio",), measured):
        errors, _ = metrics.absolute_errors(runner.run(main)[0].logits, oracle.logits[MAIN])
        measured.decode_errors = errors.tolist()
        measured.where["decode_noise_ratio"] = DECODED
        against_floor(oracle, measured, "decode_noise_ratio", float(errors.mean()))
    sequences = [*(window.inputs for window in oracle.windows), *(continuation.ids for continuation in oracle.continuations)]
    if admitted(runner, list(map(token_by_token, sequences)), TEXT_WINDOWS, tolerances.TEXT_CHECKS, measured):
        score_text(oracle, runner, measured)


def fitting(scenarios: Sequence[Scenario], runner: PlanRunner, measured: StageMeasurement, checks: Sequence[str]) -> list[Scenario]:
    """The scenarios that the plan has rows and positions for; where there are none, none of the ``checks`` is judged."""
    fit = [scenario for scenario in scenarios if runner.admits(scenario)]
    if left_out := ", ".join(scenario.name for scenario in scenarios if scenario not in fit):
        reason = runner.too_small_for(left_out)
        measured.warnings.append(f"not run on all scenarios: {reason}")
        if not fit:
            measured.missing |= dict.fromkeys(checks, reason)
    return fit


def admitted(runner: PlanRunner, sequences: list[Scenario], what: str, checks: tuple[str, ...], measured: StageMeasurement) -> bool:
    """Whether the plan has positions for all of some sequences; where it has not, what would be measured on them is missing, and why."""
    if all(map(runner.admits, sequences)):
        return True
    reason = runner.too_small_for(what)
    measured.warnings.append(f"not run: {reason}")
    measured.numbers |= dict.fromkeys(checks)  # mean_kl of a few scenario positions is none of the text
    measured.missing |= dict.fromkeys(checks, reason)
    return False


def _run_scenarios(oracle: Oracle, runner: PlanRunner, scenarios: list[Scenario], measured: StageMeasurement) -> None:
    caches = []
    for scenario in scenarios:
        rows = runner.run(scenario)
        measured.scenarios.append(compare_scenario(oracle, scenario, rows))
        caches.append(cache_errors(oracle, scenario, rows))
    summarise(oracle, measured)
    worst_cache(measured, caches)
    summarise_parts(oracle, measured)
