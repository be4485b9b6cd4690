"""What narrowing to the node found, as people read it: one row a stage, and what was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from validation.render.gates import Report
from validation.render.wording import DASH, number

COLUMNS = ("Stage", "Node", "Where", "Tensor", "Error", "Allowed", "What is wrong", "Made by")
MOST_SUSPECTS = 8
"""Nodes that are named beside the one."""


@dataclass(frozen=True)
class BisectView:
    """Cells of ``COLUMNS`` of each stage where a node was found, and a line for every stage: what was compared."""

    rows: Sequence[tuple[str, ...]]
    lines: Sequence[tuple[str, str]]


def view_bisect(report: Report) -> BisectView | None:
    """What to show; None where nothing was narrowed."""
    narrowed = [(str(stage["stage"]), stage["bisect"]) for stage in report.get("stages") or () if stage.get("bisect")]
    if not narrowed:
        return None
    rows = [_row(stage, entry["found"]) for stage, entry in narrowed if entry["found"]]
    lines = [(stage, line) for stage, entry in narrowed for line in _lines(entry)]
    return BisectView(rows, lines)


def bisect_line(stage: Report) -> str | None:
    """``narrowed: fused: …`` for a terminal; None where the stage was not narrowed."""
    entry = stage.get("bisect")
    return None if not entry else f"narrowed: {stage['stage']}: {entry['words']}"


def _row(stage: str, found: Report) -> tuple[str, ...]:
    where = "outside the layers" if found["layer"] is None else f"layer {found['layer']}"
    where += f", {found['call']}" if found["call"] else ""
    error = "not finite" if found["error"] is None else number(found["error"])
    node = f"{found['node']} ({found['op']})"
    allowed = DASH if found["allowed"] is None else number(found["allowed"], digits=2)
    return stage, node, where, found["tensor"], error, allowed, found["why"], found["hint"] or DASH


def _lines(entry: Report) -> list[str]:
    looked, found = entry["looked_at"], entry["found"]
    if not found:
        return [entry["words"], *looked["notes"]]
    between = found["suspects"]
    named = ", ".join(between[:MOST_SUSPECTS]) + (f" and {len(between) - MOST_SUSPECTS} more" if len(between) > MOST_SUSPECTS else "")
    return [*([f"between the tensors that are right and this one: {named}"] if between else []), *looked["notes"]]
