"""``validate --graph``: any decoder's ONNX file against the checkpoint that it was exported from → ``parity.{json,md,html,xml}``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifact.errors import UsageError, ValidationError
from artifact.layout import parameter_count
from artifact.manifest import MANIFEST, atomic_write
from artifact.progress import Progress, silent
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation import machine, tolerances
from validation.baseline_file import Baseline
from validation.besides import NOTHING, Besides
from validation.finite import without_nonfinite
from validation.limit_rows import rows
from validation.lone.floors import cached_floor
from validation.lone.graph import LoneGraph, open_lone_graph
from validation.lone.limits import Plan, plan_scenarios
from validation.lone.measure import LOCAL, UNCUT, measure_graph
from validation.oracle import Oracle
from validation.parity import first_mismatch, quality_unproven
from validation.prepare import prepare_oracle
from validation.render import render_all, schema
from validation.structure import ONE_POSITION
from validation.text import TOKENIZER
from validation.transformers_check import reference_rows

REPORTS = "reports"


def validate_graph(
    path: Path,
    checkpoint: Checkpoint,
    *,
    out: Path | None,
    text: Sequence[Path] | None,
    tokens: int | None,
    besides: Besides = NOTHING,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a graph and write ``parity.{json,md,html,xml}``.

    Args:
        path: the ONNX file.
        checkpoint: what it was exported from; the reference's weights and tokenizer.
        out: folder of the reports; None is ``reports/<name of the file without .onnx>/`` beside it.
        text: what to score; None are the texts that come with the package.
        tokens: how many tokens to score of all texts together; None is 1,024 of each, and at least 2,048.
        besides: what else is asked for.
        progress: told what is being done.

    Returns:
        The report; ``passed`` is False where anything does not match.

    Raises:
        FusionError, ValidationError: the file can't be read, is no decoder, or can't be run at different lengths; no usable text.
        UsageError: the graph's sizes are not the checkpoint's, or ``out`` holds an artifact's own reports.
    """
    start = time.perf_counter()
    folder = reports_folder(path, out)
    graph = open_lone_graph(path, checkpoint.config, checkpoint.source)
    described = graph.describe(progress)
    with tempfile.TemporaryDirectory(prefix="llama2trt-") as scratch:
        step = StepContext(Path(scratch), progress)
        sidecars = checkpoint.write_sidecars(step.write)
        if text is not None and TOKENIZER not in sidecars:
            raise ValidationError(f"{checkpoint.source} has no {TOKENIZER}, so {text[0]} can't be tokenised", hint="leave out --text")
        oracle = prepare_oracle(step, checkpoint, graph.dtype, text=text, tokens=tokens, measure=cached_floor)
        measured_besides = besides.measure(step, oracle, checkpoint)
    plan = plan_scenarios(graph, oracle.scenarios)
    entry = measure_graph(oracle, graph, plan, progress)
    report = _report(graph, checkpoint, oracle, plan, entry) | {"graph": described, "hashes": described["hashes"], **measured_besides}
    report["tolerances"] += reference_rows(report["against"])
    report |= _judged(report, besides.baseline, plan, checkpoint)
    report |= {"seconds": round(time.perf_counter() - start, 2), "seconds_by_part": oracle.seconds | {entry["stage"]: entry["seconds"]}}
    finite: dict[str, Any] = without_nonfinite(report)
    for suffix, content in render_all(finite).items():
        with atomic_write(folder / f"parity.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return finite | {"reports": str(folder)}


def reports_folder(graph: Path, out: Path | None) -> Path:
    """Where the reports of a graph go.

    Raises:
        UsageError: an artifact's own reports are there.
    """
    folder = out or graph.parent / REPORTS / graph.stem
    if folder.resolve().name == REPORTS and (folder.resolve().parent / MANIFEST).exists():
        raise UsageError(f"{folder} holds the reports of an artifact", hint="give another folder to --out")
    return folder


def _report(graph: LoneGraph, checkpoint: Checkpoint, oracle: Oracle, plan: Plan, entry: dict[str, Any]) -> dict[str, Any]:
    """All of the report but its verdict and what is known only at its end."""
    name, kind, has_floor = graph.path.name, graph.precision.kind, oracle.floor.mean_abs is not None
    report: dict[str, Any] = {
        **schema.HEAD,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": name,
        "model": {
            "name": checkpoint.name,
            "source": checkpoint.source,
            "format": checkpoint.format,
            "fingerprint": checkpoint.fingerprint,
            "config": asdict(checkpoint.config),
            "dtype": kind,
            "parameters": parameter_count(checkpoint.config),
        },
        **oracle.describe_texts(),
        "float16": oracle.describe_float16(),
        "floor": oracle.floor.as_report() | {"check": tolerances.judge_reference(oracle.floor.mean_kl, oracle.floor.reason)},
        "stages": [entry],
        "not_run": [{"stage": f"{name}, {scenario}", "reason": reason} for scenario, reason in plan.not_run],
        "engines": [],
        "checksums": None,
        "tolerances": rows(name, tolerances.limits_of(kind, has_floor=has_floor)),
        "versions": machine.versions(),
        "machine": machine.machine(),
    }
    if any(check["check"] == LOCAL and check["passed"] is None for check in entry["checks"]) and not graph.names_layers:
        report["not_run"].append({"stage": f"{name}, local ratios", "reason": UNCUT})
    return report


def _judged(report: dict[str, Any], baseline: Baseline | None, plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """The verdict on a report, and its comparison with a baseline."""
    compared = None if baseline is None else baseline.judge(without_nonfinite(report))
    held = (report["floor"]["check"]["passed"], *((other or {}).get("passed") for other in (compared, report["against"])))
    report = report | {"baseline": compared, "passed": False if False in held else report["stages"][0]["passed"]}
    return {key: report[key] for key in ("baseline", "passed")} | {"verdict": _verdict(report, plan), "headline": _headline(report, plan, checkpoint)}


def _verdict(report: dict[str, Any], plan: Plan) -> str:
    """``passed: 3 of 4 scenarios ran whole, 1 not run``."""
    word = {True: "passed", False: "failed", None: "not judged"}[report["passed"]]
    cut = {scenario.partition(",")[0] for scenario, _ in plan.not_run}
    whole = sum(entry["scenario"] not in cut for entry in report["stages"][0]["scenarios"])
    missing = len(report["not_run"])
    total = len(cut | {scenario.name for scenario in plan.scenarios})
    worse = ", worse than the baseline" if (report.get("baseline") or {}).get("passed") is False else ""
    return f"{word}: {whole} of {total} scenarios ran whole{worse}" + (f", {missing} not run" if missing else "")


def _headline(report: dict[str, Any], plan: Plan, checkpoint: Checkpoint) -> str:
    """The first thing that does not match, or what was proven; what was not run is said beside it."""
    if mismatch := first_mismatch(report):
        return mismatch
    if report["passed"] is None:
        return f"{report['stages'][0]['stage']}: measured, not judged: {report['model']['dtype']} has no limit for quality"
    names = ", ".join(scenario.name for scenario in plan.scenarios)
    structure = f"structure proven for {names}" if plan.not_run else "structure proven"
    unproven = quality_unproven(report, random_weights=checkpoint.format == "random")
    if unproven is None and report["stages"][0]["perplexity"] is None:
        unproven = ONE_POSITION
    return f"{structure}, quality not: {unproven}" if unproven else f"{structure}; quality proven"
