"""A report against an older one of the same model: which gates and numbers became worse, by margins that are declared here.

Nothing is measured: two reports in, their comparison out. A number is worse when it differs by more than its margin: the texts are the same by their
hash, so what other text would give is no excuse. A gate is lost when it passed and does not any more, for whatever reason. What is better is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from artifact.errors import ValidationError
from validation.render.gates import groups
from validation.render.wording import metric as written

Report = Mapping[str, Any]
REGRESSED, IMPROVED, SAME, MISSING = "regressed", "improved", "same", "not measured"
GROUP = "baseline"
UNSAID = "not judged: not measured"
"""What a check says of a number that is gone without a reason."""


@dataclass(frozen=True)
class Margin:
    """By how much a number may be worse than in the baseline.

    Attributes:
        key: of a stage, or of a plan.
        share: of the baseline's value.
        least: the same in the number's own unit; the larger of the two counts.
        reason: why so much.
    """

    key: str
    share: float
    least: float
    reason: str
    higher_is_better: bool = False


_KERNELS = "other kernels and processors sum in another order"
STAGE_MARGINS = (
    Margin("mean_kl", 0.1, 1e-5, "nats: a tenth; float16 itself measures 1e-5 to 2e-5"),
    Margin("perplexity_increase_pct", 0.0, 0.1, "a tenth of a per cent of perplexity"),
    Margin("top1_agreement", 0.0, 0.005, "one position in 200", higher_is_better=True),
    Margin("noise_ratio", 0.1, 0.05, _KERNELS),
    Margin("decode_noise_ratio", 0.1, 0.05, _KERNELS),
    Margin("part_noise_ratio", 0.2, 0.1, f"few positions; {_KERNELS}"),
    Margin("strict_noise_ratio", 0.1, 0.05, _KERNELS),
    Margin("worst_local_ratio", 0.2, 0.1, f"one layer of all; {_KERNELS}"),
    Margin("cache_error", 0.2, 1e-5, f"one layer of all; {_KERNELS}"),
    Margin("range_peak", 0.1, 0.01, "a share of float16's range, on the same text"),
    Margin("max_abs_relative", 1.0, 1e-5, "one logit of all: a factor of two"),
)
PLAN_MARGINS = (
    Margin("bytes", 0.02, 1e6, "a plan that grows holds a weight twice, or in a wider type"),
    Margin("bytes_per_weight", 0.02, 0.01, "weights stored twice, or in a wider type"),
)


def require_comparable(now: Report, baseline: Report) -> None:
    """Refuse a baseline of something else; what a report does not hold yet is not asked.

    Raises:
        ValidationError: another checkpoint, dtype, cache form or text; the message says what, and both values.
    """
    ours, theirs = dict(_identity(now)), dict(_identity(baseline))
    for what, value in ours.items():
        if what in theirs and value != theirs[what]:
            raise ValidationError(
                f"the baseline can't be compared: {what}: there {theirs[what]}, here {value}",
                hint="--baseline takes a report of the same checkpoint and texts: validate without it, and keep the parity.json as the new baseline",
            )


def compare(now: Report, baseline: Report) -> dict[str, Any]:
    """Hold a report against an older one.

    Args:
        now, baseline: two reports of the present schema.

    Returns:
        passed (False where anything regressed), words, differs, not_compared, changes and checks, as ``parity.schema.json`` describes them.

    Raises:
        ValidationError: they are of different things, or have no stage in common.
    """
    require_comparable(now, baseline)
    _require_common_stage(now, baseline)
    idle = [entry for name in _names(baseline) if (entry := _idle(now, name)) is not None]
    lost = list(_lost_gates(now, baseline, {entry["stage"] for entry in idle}))
    changes = [*_changes(now, baseline, "stages", "stage", STAGE_MARGINS), *_changes(now, baseline, "engines", "file", PLAN_MARGINS)]
    checks = [*lost, *(_check(change, margin) for change, margin in changes)]
    report = {"differs": list(_differences(now, baseline)), "not_compared": idle, "changes": [change for change, _ in changes], "checks": checks}
    return {"passed": not any(check["passed"] is False for check in checks), "words": _words(report), **report}


def _identity(report: Report) -> Iterator[tuple[str, Any]]:
    """(what, value) that two reports must share."""
    model = report.get("model") or {}
    for key, what in (("fingerprint", "another checkpoint"), ("dtype", "another dtype")):
        if key in model:
            yield what, model[key]
    if report.get("cache"):
        yield "another KV cache", report["cache"]["form"]
    if "texts" in report:
        yield "other texts", ", ".join(f"{text['name']} ({text['scored_tokens']} tokens, {str(text['sha256'])[:12]})" for text in report["texts"])
        yield "another kind of text", ", ".join(text["kind"] for text in report["texts"])
        windows = report.get("text") or {}
        yield "other windows of the text", ", ".join(f"{key} {windows.get(key)}" for key in ("window", "stride", "bos"))
    for stage in report.get("stages") or ():
        calls = [f"{run['scenario']} {run['positions']} in {run['calls']}" for run in stage.get("scenarios") or ()]
        if calls:
            yield f"{stage['stage']}: scenarios of other lengths (positions in calls)", ", ".join(calls)


def _require_common_stage(now: Report, baseline: Report) -> None:
    ours, theirs = ([stage["stage"] for stage in report["stages"]] for report in (now, baseline))
    if not set(ours) & set(theirs):
        raise ValidationError(
            f"the baseline can't be compared: no stage in common: there {', '.join(theirs) or 'none'}, here {', '.join(ours) or 'none'}",
            hint="--stage says which stages are measured",
        )


def _names(report: Report) -> list[str]:
    return [stage["stage"] for stage in report["stages"]]


def _idle(now: Report, stage: str) -> dict[str, Any] | None:
    """Why a stage of the baseline did not run now; None where it ran, or is gone."""
    ran = stage in _names(now)
    return next(({"stage": stage, "reason": entry["reason"]} for entry in now["not_run"] if entry["stage"] == stage and not ran), None)


def _lost_gates(now: Report, baseline: Report, idle: set[str]) -> Iterator[dict[str, Any]]:
    """A check for each group of gates (stage, plan, checksums): how many passed in the baseline and do not now."""
    groups_now = {group.name: group for group in groups(now)}
    for old in groups({**baseline, "baseline": None}):  # its own baseline is history
        held = [name for name, passed in _by_name(old.checks).items() if passed is True]
        if old.name in idle or not held:
            continue
        outcomes = _by_name(groups_now[old.name].checks) if old.name in groups_now else {}
        gone = [name for name in held if outcomes.get(name) is not True]
        words = [f"{name} {_fate(outcomes, name)}" for name in gone] if old.name in groups_now else ["it is there no more"]
        reason = f"passed in the baseline: {'; '.join(words)}" if gone else f"all {len(held)} gates that passed in the baseline still do"
        yield {
            "check": "gates_lost", "value": len(gone), "limit": 0, "comparison": "==", "passed": not gone, "reason": reason, "where": old.name,
        }  # fmt: skip


def _by_name(checks: tuple[dict[str, Any], ...]) -> dict[str, bool | None]:
    """Gate → its verdict; of several with one name (by profile) the worst. What says more than a verdict is no gate."""
    found: dict[str, bool | None] = {}
    for check in checks:
        name = check["check"]
        outcomes = (check["passed"], found.get(name, True))
        found[name] = False if False in outcomes else None if None in outcomes else True
    return found


def _fate(outcomes: Mapping[str, bool | None], name: str) -> str:
    if name not in outcomes:
        return "is not checked now"
    return "fails now" if outcomes[name] is False else "is not judged now"


def _changes(now: Report, baseline: Report, part: str, key: str, margins: tuple[Margin, ...]) -> Iterator[tuple[dict[str, Any], Margin]]:
    """Every number that both reports have a place for, with its margin."""
    ours = {entry[key]: entry for entry in now[part]}
    for old in baseline[part]:
        if old[key] in ours:
            for margin in margins:
                if isinstance(old.get(margin.key), int | float):
                    yield _change(old[key], margin, ours[old[key]], old), margin


def _change(name: str, margin: Margin, new: Report, old: Report) -> dict[str, Any]:
    before, after = old[margin.key], new.get(margin.key)
    change = {"stage": name, "metric": margin.key, "baseline": before, "now": after, "worse_by": None, "allowed": None, "reason": None}
    if not isinstance(after, int | float) or not isfinite(after):
        why = _why_missing(new, margin.key)
        return change | {"now": None, "reason": why or UNSAID, "outcome": MISSING if why else REGRESSED}
    worse = (before - after) if margin.higher_is_better else (after - before)
    allowed = max(margin.share * abs(before), margin.least)
    outcome = REGRESSED if worse > allowed else IMPROVED if -worse > allowed else SAME
    return change | {"worse_by": worse, "allowed": allowed, "outcome": outcome}


def _why_missing(entry: Report, key: str) -> str | None:
    """What the checks of a stage or a plan say of a number that was not measured; None where they say nothing, or that it failed."""
    checks = entry.get("checks") or (entry.get("audit") or {}).get("checks") or ()
    said = (check["reason"] for check in checks if check["check"] == key and check["passed"] is None and check["value"] is None)
    return next((reason for reason in said if reason and reason != UNSAID), None)


def _check(change: Mapping[str, Any], margin: Margin) -> dict[str, Any]:
    """A change as a check of the report: the limit is the baseline's value and what is allowed."""
    before, gone = change["baseline"], change["now"] is None
    sign, comparison = (-1, ">=") if margin.higher_is_better else (1, "<=")
    told = f"the baseline has {written(margin.key, before)}; margin: {margin.reason}"
    return {
        "check": margin.key,
        "value": change["now"],
        "limit": before if gone else before + sign * change["allowed"],
        "comparison": comparison,
        "passed": None if change["outcome"] == MISSING else change["outcome"] != REGRESSED,
        "reason": f"{change['reason']}; {told}" if gone else told,
        "where": change["stage"],
    }


def _differences(now: Report, baseline: Report) -> Iterator[dict[str, Any]]:
    """What is otherwise without hindering the comparison: versions, the machine, limits, stages that are new."""
    for part in ("versions", "machine"):
        ours, theirs = now[part], baseline[part]
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield {"what": f"{part}: {key}", "baseline": theirs.get(key), "now": ours.get(key)}
    limits, old = ({(row["stage"], row["check"]): row["limit"] for row in report["tolerances"]} for report in (now, baseline))
    for stage, check in sorted(limits.keys() & old.keys()):
        if limits[stage, check] != old[stage, check]:
            yield {"what": f"limit of {check}, {stage}", "baseline": old[stage, check], "now": limits[stage, check]}
    runs, before = ({stage["stage"]: stage.get("range_run") for stage in report["stages"]} for report in (now, baseline))
    for name in sorted(runs.keys() & before.keys()):
        if runs[name] != before[name]:
            yield {"what": f"run of range_peak, {name}", "baseline": before[name], "now": runs[name]}
    for stage in _names(now):
        if stage not in _names(baseline):
            yield {"what": f"stage {stage}", "baseline": None, "now": "new"}


def _words(report: Report) -> str:
    """``1 regression: int8 mean_kl; 40 numbers compared, 1 better``."""
    outcomes = [change["outcome"] for change in report["changes"]]
    worse = [f"{check['where']} {check['check']}" for check in report["checks"] if check["passed"] is False]
    many = f"{len(worse)} regression{'s' if len(worse) > 1 else ''}: {', '.join(worse[:3])}{' …' if len(worse) > 3 else ''}"
    named = many if worse else "no regression"
    better = f", {outcomes.count(IMPROVED)} better" if IMPROVED in outcomes else ""
    idle = f", {len(report['not_compared'])} stages not run now" if report["not_compared"] else ""
    unknown = f", {outcomes.count(MISSING)} not measured now" if MISSING in outcomes else ""
    return f"{named}; {len(outcomes) - outcomes.count(MISSING)} numbers compared{better}{unknown}{idle}"
