"""Every check of a report in one shape, whoever made it: stored checksums, stages, plan audits.

A group is what becomes a test suite in JUnit, a block of the HTML page and the source of the failing list: its name and its checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from validation.render.wording import limit, metric, plus_minus, shorten

Report = Mapping[str, Any]
Check = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The checks of one stage, of one plan, of the reference, or of the stored checksums; ``passed`` is true, false or None (not judged)."""

    name: str
    passed: bool | None
    checks: tuple[Check, ...]
    seconds: float | None = None


@dataclass(frozen=True)
class Metric:
    """A column of the stage table: the key of the stage, and the checks that gate it, the first one found."""

    key: str
    label: str
    gates: tuple[str, ...]
    explanation: str


METRICS = (
    Metric("max_abs", "Max abs", ("max_abs", "max_abs_relative", "engine_difference"), "largest |logit − reference| of all scenarios"),
    Metric("mean_abs", "Mean abs", ("mean_abs", "scenario_spread", "engine_noise_ratio"), "mean |logit − reference| of the worst scenario"),
    Metric("noise_ratio", "Noise ratio", ("noise_ratio",), "mean abs ÷ the floor"),
    Metric("part_noise_ratio", "Worst part", ("part_noise_ratio", "self_consistency"), "noise ratio of one row's prompt, chunk or steps alone"),
    Metric(
        "strict_noise_ratio", "Strict noise ratio", ("strict_noise_ratio", "strict_nonfinite"), "the same with every operation rounded to float16"
    ),
    Metric("worst_local_ratio", "Worst local ratio", ("worst_local_ratio",), "error one layer adds ÷ what rounding it to float16 adds"),
    Metric("cache_error", "Cache error", ("cache_error",), "keys and values, relative root mean square, the worst layer"),
    Metric("range_peak", "Range peak", ("range_peak",), "largest |value| of a float16 tensor, as a share of 65504"),
    Metric("mean_kl", "Mean KL", ("mean_kl",), "nats per position, reference ‖ stage"),
    Metric(
        "top1_agreement",
        "Top-1",
        ("top1_agreement", "decisive_disagreements"),
        "positions with the same best token; the gate counts decisive ones only",
    ),
    Metric("perplexity_increase_pct", "Perplexity", ("perplexity_increase_pct",), "increase over the reference, ± its standard error"),
)
"""Columns of the stage table, in reading order: the numbers first, then their proportion, then what a user notices."""


GATE_WORDS = {
    "max_abs_relative": "relative",
    "engine_difference": "stage",
    "engine_noise_ratio": "stage",
    "scenario_spread": "spread",
    "self_consistency": "itself",
    "strict_nonfinite": "not finite",
    "decisive_disagreements": "decisive",
}
"""What is said of a gate that judges another number than its column shows."""


def gate_of(stage: Report, metric: Metric) -> Check | None:
    """The check that gates a metric in a stage, or None where the metric is only shown."""
    by_name = {check["check"]: check for check in stage.get("checks") or ()}
    return next((by_name[name] for name in metric.gates if name in by_name), None)


def value_text(stage: Report, column: Metric) -> str:
    """What stands in a cell of the stage table: the value, with as many digits as its gate needs."""
    value, gate = stage.get(column.key), gate_of(stage, column)
    if column.key == "perplexity_increase_pct":
        return plus_minus(value, stage.get("perplexity_se_pct"))
    return metric(column.key, value, against=gate["limit"] if gate and gate["check"] == column.key else None)


def gate_text(gate: Check, column: Metric) -> str:
    """What stands beside it: ``≤ 1.25``; a gate on another number says which, and how much that is: ``relative 3.1e-6 ≤ 1e-4``.

    KL is shown of all texts and gated on the worst, which is named.
    """
    name = gate["check"]
    if name == "mean_kl" and gate.get("where"):
        return f"{shorten(gate['where'], 24)} {metric(name, gate.get('value'), against=gate.get('limit'))} {limit(name, gate)}"
    if name not in GATE_WORDS:
        return limit(name, gate)
    return f"{GATE_WORDS[name]} {metric(name, gate.get('value'), against=gate.get('limit'))} {limit(name, gate)}".replace(" = 0", "")


def groups(report: Report) -> list[Group]:
    """All checks in the order they are carried out: checksums, the reference (and against transformers), stages, plans, the baseline."""
    return [*_checksums(report), *_reference(report), *_against(report), *_stages(report), *_engines(report), *_baseline(report)]


def failing(report: Report) -> list[tuple[str, Check]]:
    """(group, check) of every check that failed."""
    return [(group.name, check) for group in groups(report) for check in group.checks if check["passed"] is False]


def counts(report: Report) -> dict[bool | None, int]:
    """Number of checks that passed (True), failed (False) and judge nothing (None)."""
    verdicts = [check["passed"] for group in groups(report) for check in group.checks]
    return {verdict: verdicts.count(verdict) for verdict in (True, False, None)}


def _reference(report: Report) -> Iterator[Group]:
    check = (report.get("floor") or {}).get("check")
    if check:
        yield Group("reference", check["passed"], (check,))


def _against(report: Report) -> Iterator[Group]:
    if entry := (report.get("against") or {}).get("entry"):
        yield _agreeing(Group(f"reference against {entry['stage']}", entry["passed"], tuple(entry["checks"]), entry["seconds"]))


def _stages(report: Report) -> Iterator[Group]:
    for stage in report.get("stages") or ():
        yield _agreeing(Group(stage["stage"], stage.get("passed"), tuple(stage.get("checks") or ()), stage.get("seconds")))


def _engines(report: Report) -> Iterator[Group]:
    for engine in report.get("engines") or ():
        audit = engine.get("audit") or {}
        yield _agreeing(Group(f"audit of {engine['file']}", audit.get("passed"), tuple(audit.get("checks") or ())))


def _baseline(report: Report) -> Iterator[Group]:
    if found := report.get("baseline"):
        yield _agreeing(Group("baseline", found["passed"], tuple(found["checks"])))


def _checksums(report: Report) -> Iterator[Group]:
    stored = report.get("checksums")
    if not stored:
        return
    failed = [_checksum_failure(entry) for entry in stored.get("failed") or ()]
    verified: Check = {
        "check": "checksums_verified", "value": stored.get("verified"), "limit": None, "comparison": "==", "where": None,
        "passed": stored.get("passed") is not False or None, "reason": "stored weights and graphs are the bytes that were written",
    }  # fmt: skip
    yield _agreeing(Group("checksums", stored.get("passed"), (*failed, verified)))


def _checksum_failure(entry: Report) -> Check:
    return {
        "check": "checksum", "value": str(entry.get("got"))[:12], "limit": str(entry.get("expected"))[:12], "comparison": "==", "passed": False,
        "where": " ".join(str(entry[key]) for key in ("file", "tensor") if entry.get(key)),
        "reason": f"{entry['step']} is stale, do it again: {entry['hint']}" if entry.get("hint") else "the stored bytes are not those written",
    }  # fmt: skip


def _agreeing(group: Group) -> Group:
    """The group, with a check that says so where it failed although none of its checks did: a renderer must never look greener than the verdict."""
    if group.passed is not False or any(check["passed"] is False for check in group.checks):
        return group
    verdict: Check = {
        "check": "verdict", "value": "failed", "limit": "passed", "comparison": "==", "passed": False, "where": None,
        "reason": "judged as failed, although no single check of it failed",
    }  # fmt: skip
    return Group(group.name, False, (verdict, *group.checks), group.seconds)
