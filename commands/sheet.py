"""What a report is made of for a person: lines and tables of plain text, rendered by cli.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """One line (no rows), or one table; ``numbers`` aligns all columns but the first to the right."""

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    numbers: bool = False


def failures(what: str, checks: list[Report]) -> Iterable[Sheet]:
    """A line for every check that did not hold."""
    for check in checks:
        if check["passed"] is False:
            where = f" in {check['where']}" if check.get("where") else ""
            yield Sheet(f"{what}: {check['check']}{where} is {number(check['value'])}, must be {check['comparison']} {number(check['limit'])}")


def verdict(passed: bool | None) -> str:
    """`passed`, `FAILED`, or a dash where nothing was judged."""
    return {True: "passed", False: "FAILED", None: "–"}[passed]


def number(value: float | None) -> str:
    """Three digits of a number; anything else as it is."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def megabytes(size: int) -> str:
    """`1,234 MB`."""
    return f"{size / 1e6:,.0f} MB"
