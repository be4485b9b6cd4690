"""Checks that failed, as a person reads them: of stages, of audits, of a comparison with a baseline."""

from __future__ import annotations

from collections.abc import Iterable

from commands.sheet import Report, Sheet


def failures(what: str, checks: list[Report]) -> Iterable[Sheet]:
    """A line for each check that failed."""
    for check in checks:
        if check["passed"] is False:
            where = f" in {check['where']}" if check.get("where") else ""
            yield Sheet(f"{what}: {check['check']}{where} is {number(check['value'])}, must be {check['comparison']} {number(check['limit'])}")


def baseline_sheets(found: Report | None) -> Iterable[Sheet]:
    """What became worse, in full; the rest is counted."""
    if found:
        yield from failures("worse than the baseline", found["checks"])
        yield Sheet(f"against {found['file']}: {found['words']}")


def number(value: float | None) -> str:
    """Three significant digits; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, (int, float)) else str(value)
