"""The error budget as people read it: one row a stage and measure, one column a cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from validation.render.gates import Report
from validation.render.wording import DASH, SPACE, number

COLUMNS = ("Stage", "Error", "Total", "Where it came from")
WORDS = {"mean_abs": "mean abs", "strict_mean_abs": "mean abs, every operation rounded", "mean_kl": "mean KL"}
MOST_KINDS = 5
"""Kinds of operator that are shown, those that add most."""
HOW = "What the error grew by at each step. Errors of independent causes add less than that, so a share can be negative; shares add up to the total."


@dataclass(frozen=True)
class BudgetView:
    """Cells of ``COLUMNS``, and how they are to be read."""

    rows: Sequence[tuple[str, ...]]
    how: str = HOW


def view_budget(report: Report) -> BudgetView | None:
    """What to show; None where no stage was made from another that was measured."""
    rows: list[tuple[str, ...]] = [
        (budget["stage"], WORDS[measure], number(found["total"]), ", ".join(map(_part, found["parts"])))
        for budget in report.get("error_budget") or ()
        for measure, found in budget["measures"].items()
    ]
    rows += [_layer(stage["stage"], stage["op_errors"]) for stage in report.get("stages") or () if stage.get("op_errors")]
    return BudgetView(rows) if rows else None


def _layer(stage: str, found: Report) -> tuple[str, ...]:
    kinds = ", ".join(f"{kind['nodes']} {kind['op']} {number(kind['added'], digits=2)}" for kind in found["kinds"][:MOST_KINDS] if kind["added"] != 0)
    return stage, f"relative, layer {found['layer']} alone, every operation rounded", number(found["error"]), kinds


def _part(part: Report) -> str:
    share = DASH if part["share"] is None else f"{part['share']:+.0%}".replace("-", "−").replace("%", f"{SPACE}%")
    return f"{part['cause']} {share}"
