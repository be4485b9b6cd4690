"""The parity report: checksums, then every stage against the reference, then what could not run, and one verdict.

Every number is in the report whether it passes or not; the gate (tolerances.py) stands apart from the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifact.hashing import sha256_of
from artifact.io_spec import Dtype
from artifact.layout import parameter_count
from artifact.manifest import kv_cache_of, require_artifact
from artifact.steps import StepContext
from engines.device import Device
from exporter.checkpoints import Checkpoint
from validation import calibrated_on, limit_rows, machine, tolerances
from validation.baseline_file import Baseline
from validation.besides import NOTHING, Besides
from validation.bisect.edge_report import measure_edges
from validation.bisect.report import bisect_stages
from validation.checksums import verify_checksums
from validation.drift import drift_words
from validation.engines import engine_entries, split_engines
from validation.error_budget import error_budgets
from validation.finite import without_nonfinite
from validation.manner import DEFAULT, Manner
from validation.oracle import Oracle
from validation.plan_stage import measure_plan
from validation.prepare import prepare_oracle
from validation.render import schema, write_reports
from validation.resume import forget_stages
from validation.sensitivity_file import read_sensitivities
from validation.stage_choice import choose_stages
from validation.stages import measure_stages
from validation.transformers_check import reference_rows


def validate_artifact(
    step: StepContext,
    *,
    checkpoint: Checkpoint,
    stages: list[str] | None,
    text: Sequence[Path] | None,
    tokens: int | None,
    device: Device | str | None = None,
    manner: Manner = DEFAULT,
    besides: Besides = NOTHING,
) -> dict[str, Any]:
    """Measure every stage of an artifact and write ``reports/parity.{json,md,html,xml}``.

    Args:
        step: the artifact; its manifest says what each step wrote.
        checkpoint: what the artifact was made from; the reference's weights.
        stages: which; None is every graph that is there.
        text, tokens: what to score, and how many tokens of all texts together, as in ``prepare_oracle``.
        device: the GPU that plans are run on; the reason why there is none; None where plans are not to be run.
        manner: whether graphs are run one layer at a time, and whether stages are narrowed to the node.
        besides: what else is asked for.

    Returns:
        The report; ``passed`` is False where anything does not match.

    Raises:
        ValidationError: a stage that is not there, no usable text, a model too short for the scenarios, or a baseline of something else.
    """
    start, manifest = time.perf_counter(), require_artifact(step.artifact, "validate")
    dtype: Dtype = manifest["model"]["dtype"]
    chosen, unknown = choose_stages(step.artifact, stages, dtype)
    stored = verify_checksums(step.artifact, manifest, step.progress)
    seconds = {"checksums": round(time.perf_counter() - start, 2)}
    oracle = prepare_oracle(step, checkpoint, dtype, kv_cache_of(manifest["model"]), text=text, tokens=tokens, streamed=manner.streamed)
    measured_besides = besides.measure(step, oracle, checkpoint)
    measured, oracle.resumed = measure_stages(step, oracle, chosen)
    measured = _look_closer(step, oracle, measured, engines := engine_entries(step.artifact), manner)
    runnable, not_run = split_engines(step.artifact, engines, device, chosen)
    if isinstance(device, Device):
        measured += [measure_plan(oracle, engine, device, step.progress) for engine in runnable]
    report = {
        **schema.HEAD,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": step.artifact.name,
        "model": {**manifest["model"], "parameters": parameter_count(checkpoint.config)},
        **_describe(oracle),
        **measured_besides,
        "texts": calibrated_on.mark_all(oracle.describe_texts()["texts"], manifest, chosen, text),
        "fusion": manifest["steps"].get("fuse", {}).get("report"),
        "sensitivity": read_sensitivities(step.artifact),
        **{"stages": measured, "error_budget": error_budgets(measured, dtype, oracle.floor.mean_abs)},
        "not_run": [*not_run, *unknown],
        "engines": engines,
        "checksums": stored.as_report(),
        "tolerances": [*reference_rows(measured_besides["against"]), *_limits(oracle, chosen, runnable, manner)],
        **{"versions": machine.versions(), "machine": machine.machine()},
        "hashes": {f"{stage}.onnx": sha256_of(step.artifact / f"{stage}.onnx") for stage in chosen},
    }
    report |= _judged(report, besides.baseline, random_weights=checkpoint.format == "random", left_out=len(unknown))
    report["seconds"] = round(time.perf_counter() - start, 2)
    report["seconds_by_part"] = seconds | oracle.seconds | {entry["stage"]: entry["seconds"] for entry in measured}
    return _write(step, without_nonfinite(report))


def _look_closer(
    step: StepContext, oracle: Oracle, stages: list[dict[str, Any]], engines: list[dict[str, Any]], manner: Manner
) -> list[dict[str, Any]]:
    """What is looked at where it was asked for; narrowing last, because it goes by what the edges found."""
    stages = measure_edges(step, oracle, stages, engines) if manner.edges else stages
    return bisect_stages(step, oracle, stages) if manner.bisect else stages


def _write(step: StepContext, report: dict[str, Any]) -> dict[str, Any]:
    """Write a finished report; what was kept for an interruption is not needed any more."""
    write_reports(step, report)
    forget_stages(step)
    return report


def _describe(oracle: Oracle) -> dict[str, Any]:
    """What the stages are held against."""
    return {
        **oracle.describe_execution(),
        **oracle.describe_texts(),
        "float16": oracle.describe_float16(),
        "floor": oracle.floor.as_report() | {"check": tolerances.judge_reference(oracle.floor.mean_kl, oracle.floor.reason)},
    }


def _judged(report: dict[str, Any], baseline: Baseline | None, *, random_weights: bool, left_out: int) -> dict[str, Any]:
    """The comparison with a baseline, and the verdict on all."""
    report = report | {"baseline": None if baseline is None else baseline.judge(without_nonfinite(report))}
    report["passed"] = overall(report)
    words = {"verdict": verdict(report), "headline": headline(report, random_weights=random_weights, left_out=left_out)}
    return {key: report[key] for key in ("baseline", "passed")} | words


def _limits(oracle: Oracle, stages: list[str], plans: list[dict[str, Any]], manner: Manner) -> list[dict[str, Any]]:
    """The rows that judge what was run: stages and plans."""
    asked_for = [*([tolerances.EDGES] if manner.edges else []), *([tolerances.NARROWED] if manner.bisect else [])]
    asked: dict[str, Any] = {"kv_cache": oracle.kv_cache, "streamed": oracle.residency.streamed, "asked_for": asked_for}
    rows = limit_rows.table(stages, oracle.dtype, has_floor=oracle.floor.mean_abs is not None, **asked)
    return [*rows, *(row for plan in plans for row in limit_rows.plan_rows(plan, kv_cache=oracle.kv_cache))]


def overall(report: dict[str, Any]) -> bool | None:
    """False if anything failed; None if no stage was judged."""
    outcomes = [stage["passed"] for stage in report["stages"]]
    audits = [(engine.get("audit") or {}).get("passed") for engine in report["engines"]]
    held = [(report["checksums"] or {}).get("passed"), report["floor"]["check"]["passed"], (report.get("baseline") or {}).get("passed")]
    held.append((report.get("against") or {}).get("passed"))
    if False in (*held, *outcomes, *audits):
        return False
    return True if outcomes and all(outcomes) else None


def verdict(report: dict[str, Any]) -> str:
    """``passed: 5 of 7 stages ran, 2 not run``."""
    word = {True: "passed", False: "failed", None: "not judged"}[report["passed"]]
    ran, missing = len(report["stages"]), len(report["not_run"])
    failed = sum(stage["passed"] is False for stage in report["stages"])
    tail = f", {failed} failed" if failed else ""
    tail += ", worse than the baseline" if (report.get("baseline") or {}).get("passed") is False else ""
    return f"{word}: {ran} of {ran + missing} stages ran{tail}" + (f", {missing} not run" if missing else "")


def headline(report: dict[str, Any], *, random_weights: bool, left_out: int = 0) -> str:
    """What the report says, in one sentence: the first thing that does not match, or what was proven, and of what.

    Args:
        report: all but the headline.
        random_weights: the checkpoint is not a trained one.
        left_out: graphs that are there and were not run; where there are any, nothing is said of the artifact as a whole.
    """
    if mismatch := first_mismatch(report):
        return mismatch
    unjudged = [stage["stage"] for stage in report["stages"] if stage["passed"] is None]
    if unjudged:
        unlimited = all(tolerances.is_ungated(stage) for stage in unjudged)
        return f"{', '.join(unjudged)}: measured, not judged" + (f": {tolerances.NO_QUALITY_LIMIT}" if unlimited else "")
    unproven = quality_unproven(report, random_weights=random_weights)
    subject = f" for {', '.join(stage['stage'] for stage in report['stages'])}" if left_out else ""
    proven = f"structure proven{subject}, quality not: {unproven}" if unproven else f"structure and quality proven{subject}"
    return proven + (f"; {left_out} graph{'s' if left_out > 1 else ''} not run" if left_out else "")


def quality_unproven(report: dict[str, Any], *, random_weights: bool) -> str | None:
    """Why the text says nothing of quality; None where it does."""
    if random_weights:
        return "random weights"
    if report["text"]["kind"] == "random ids":
        return "random token ids, because there is no tokenizer"
    if reason := calibrated_on.why_no_proof(report["texts"]):
        return reason
    for stage in report["stages"]:
        for check in stage.get("checks") or ():
            if check["check"] == "mean_kl" and check["passed"] is None:
                return f"{stage['stage']}: {check['reason']}"
    return tolerances.too_few_tokens([text["scored_tokens"] for text in report["texts"]])


def describe(check: dict[str, Any]) -> str:
    """``worst_local_ratio 15.2 in layer 15``; what could not be run says why."""
    if check["check"] == "runs":
        return str(check["reason"])
    value = check["value"]
    shown = "not finite" if value is None else f"{value:.3g}"
    return f"{check['check']} {shown} (must be {check['comparison']} {check['limit']:g})" + (f" in {check['where']}" if check["where"] else "")


def _reference_fails(check: dict[str, Any]) -> str:
    if check["check"] == "runs":
        return f"the reference could not be held against transformers: {check['reason']}"
    return f"the reference is not the model that transformers computes in float32: {describe(check)}"


def first_mismatch(report: dict[str, Any]) -> str | None:
    """The first thing that does not match, in one sentence; None where all does."""
    if failed := (report["checksums"] or {}).get("failed"):
        first = failed[0]
        if first.get("hint"):
            return f"{first['step']} is stale, it was made from another {first['file']}; do it again: {first['hint']}"
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        return f"stored bytes are not those that were written: {first['tensor'] or 'the file itself'} in {first['file']}{more}"
    if report["floor"]["check"]["passed"] is False:
        return f"the reference is not the model that transformers computes: {describe(report['floor']['check'])}"
    for check in ((report.get("against") or {}).get("entry") or {}).get("checks") or ():
        if check["passed"] is False:
            return _reference_fails(check)
    for stage in report["stages"]:
        for check in stage["checks"]:
            if check["passed"] is False:
                return f"{stage['stage']} does not match: {describe(check)}{drift_words(stage, check)}"
    failed = [f"the audit of {engine['file']} failed" for engine in report["engines"] if (engine.get("audit") or {}).get("passed") is False]
    baseline = report.get("baseline") or {}
    worse = [f"worse than the baseline: {baseline['words']}"] if baseline.get("passed") is False else []
    return next(iter([*failed, *worse]), None)
