"""The parity verdict of one engine: of its own graphs and plans, as they are now, and only where the report measured them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from artifact.engine_names import built_from, whole_graph

Verdict = dict[str, Any]
REPORT = "reports/parity.json"
WORDS = {True: "passed", False: "failed", None: "not judged"}


def engine_verdict(step: Mapping[str, Any] | None, folder: str, graphs: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> Verdict:
    """What the parity report says of an engine; of other engines' stages it takes nothing.

    Args:
        step: the recorded ``validate``; None where there is none.
        folder: of the engine, in ``engines/``.
        graphs: file → SHA-256 of every graph that the engine was made of.
        entries: of its plans, as its build recorded them.

    Returns:
        ``passed``: whether every stage of this engine did; None where one was not measured, not judged, or is another one now. ``words``; ``stages``
        {stage: passed}; ``not_run`` {stage: reason}; ``created``, ``report_sha256``.
    """
    if step is None:
        return {"passed": None, "words": "not validated yet"}
    report, sha256 = step["report"], step["outputs"].get(REPORT, {}).get("sha256")
    plan, whole = f"engine {folder}", whole_graph(entries[0].get("graph", "the engine's graph"))
    measured = report.get("hashes", {})
    own = [file.removesuffix(".onnx") for file in graphs if file in measured] + [plan]
    stages = {stage["stage"]: stage["passed"] for stage in report["stages"] if stage["stage"] in own}
    needed = (f"{built_from(whole)}.onnx", whole)
    if why := next(_unproven(graphs, measured, stages, needed), None) or _other_plan(report, plan, folder, entries, stages):
        return {"passed": None, "words": why, "report_sha256": sha256}
    passed = _outcome(report, stages, graphs)
    return {
        "passed": passed,
        "words": _words(report, passed, stages),
        "created": report["created"],
        "stages": stages,
        "not_run": {entry["stage"]: entry["reason"] for entry in report["not_run"] if entry["stage"] in own},
        "report_sha256": sha256,
    }


def _unproven(graphs: Mapping[str, str], measured: Mapping[str, str], stages: Mapping[str, Any], needed: Sequence[str]) -> Iterator[str]:
    """Graphs that the report measured in another form, then what it did not measure of the engine's graph and its stage."""
    for file, digest in graphs.items():
        if measured.get(file, digest) != digest:
            yield f"the report is of another {file}: validate again"
    for file in needed:
        if file not in measured or file.removesuffix(".onnx") not in stages:
            yield f"not measured: {file} is not in the report; validate again, without --stage"


def _other_plan(report: Mapping[str, Any], stage: str, folder: str, entries: Sequence[Mapping[str, Any]], stages: Mapping[str, Any]) -> str | None:
    """Why what was measured on the GPU is not of these plans."""
    if stage not in stages:
        return None
    ran = [engine.get("plan_sha256") for engine in report.get("engines", ()) if engine.get("folder") == folder]
    same = sorted(map(str, ran)) == sorted(str(entry["plan_sha256"]) for entry in entries)
    return None if same else "the report is of another plan, built again since: validate again"


def _outcome(report: Mapping[str, Any], stages: Mapping[str, bool | None], graphs: Mapping[str, str]) -> bool | None:
    """All of these stages, the reference that they were held against, and the stored bytes, but those of other engines' graphs."""
    failed = (report.get("checksums") or {}).get("failed", ())
    broken = any(not entry["file"].endswith(".onnx") or entry["file"] in graphs for entry in failed)
    reference = report.get("floor", {}).get("check", {}).get("passed")
    if broken or reference is False or False in stages.values():
        return False
    return True if all(stages.values()) else None


def _words(report: Mapping[str, Any], passed: bool | None, stages: Mapping[str, bool | None]) -> str:
    """The report's own words where its verdict is this engine's too; else both verdicts, each with its subject."""
    whole = f"{report['verdict']}; {report['headline']}"
    if passed is report["passed"]:
        return whole
    subject = [name for name, outcome in stages.items() if outcome is passed] or list(stages)
    return f"{WORDS[passed]}: {', '.join(subject)}; the report as a whole: {whole}"
