"""JSON holds finite numbers alone: what is not finite becomes null on its way into a report."""

from __future__ import annotations

from math import isfinite
from typing import Any


def without_nonfinite(value: Any) -> Any:
    """The same value with null for NaN and inf, which JSON can't hold; the checks have judged them already."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    return [without_nonfinite(item) for item in value] if isinstance(value, list | tuple) else value
