"""What a report is made of for a person: lines and tables of plain text, rendered by cli.py."""

from __future__ import annotations

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
