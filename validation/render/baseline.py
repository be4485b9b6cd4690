"""The comparison with a baseline as people read it: what became worse or better, what differs besides."""

from __future__ import annotations

from dataclasses import dataclass

from validation.render.gates import Report
from validation.render.wording import DASH, label, limit, metric, shorten

Row = tuple[bool | None, tuple[str, ...]]
NUMBERS = (2, 3, 4)
"""Columns of numbers of ours; the others may hold a stranger's words."""
COLUMNS = ("Stage", "Number", "Baseline", "Now", "May be", "Outcome")


@dataclass(frozen=True)
class BaselineView:
    """The comparison in words.

    Attributes:
        summary: verdict, file and date.
        rows: (passed, cells) of what changed beyond its margin, of gates that were lost, and of numbers that are gone.
        others: (passed, cells) of every other number.
        notes: what differs besides, and what was not compared.
    """

    passed: bool
    summary: str
    rows: list[Row]
    others: list[Row]
    notes: list[str]


def view_baseline(report: Report) -> BaselineView | None:
    """What to show; None where there was no baseline."""
    found = report.get("baseline")
    if not found:
        return None
    outcomes = {(change["stage"], change["metric"]): change for change in found["changes"]}
    rows, others = list[Row](), list[Row]()
    for check in found["checks"]:
        change = outcomes.get((check["where"], check["check"]))
        outcome = change["outcome"] if change else "lost" if check["passed"] is False else "kept"
        before = metric(check["check"], change["baseline"]) if change else DASH
        now = metric(check["check"], check["value"], against=check["limit"])
        why = check["reason"] if outcome == "lost" else change and change.get("reason")
        told = f"{outcome}: {why}" if why else outcome
        cells = (str(check["where"]), label(check["check"]), before, now, limit(check["check"], check), told)
        (others if outcome in ("same", "kept") else rows).append((check["passed"], cells))
    notes = [f"{item['what']}: {_short(item['baseline'])} → {_short(item['now'])}" for item in found["differs"]]
    notes += [f"{item['stage']} not compared: {item['reason']}" for item in found["not_compared"]]
    return BaselineView(found["passed"], f"{found['words']} ({found['file']} of {found['created']})", rows, others, notes)


def _short(value: object) -> str:
    return DASH if value is None else shorten(value, 60)
