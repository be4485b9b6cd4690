"""One line of a plan's audit: what was found, what may be, and why."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Check = dict[str, Any]
COMPARE: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


def check(name: str, value: float | None, limit: float | None, comparison: str, reason: str, *, where: str | None = None) -> Check:
    """The line; without a limit the value is shown and not gated, without a value the check fails."""
    passed = None if limit is None else value is not None and COMPARE[comparison](value, limit)
    return {"check": name, "value": value, "limit": limit, "comparison": comparison, "passed": passed, "reason": reason, "where": where}


def all_passed(outcomes: Iterable[bool | None]) -> bool | None:
    """False where any failed, else None where any was not judged, else True."""
    found = list(outcomes)
    return False if False in found else None if None in found else True


def first(items: Sequence[str]) -> str | None:
    """The first of them, and how many more."""
    if not items:
        return None
    return items[0] if len(items) == 1 else f"{items[0]} and {len(items) - 1} more"
