"""How long the rest of equal pieces of work will take, from those that are done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SHORTEST = 10.0
"""Seconds below which nothing is said."""


@dataclass
class TimeLeft:
    """A clock for ``total`` pieces that cost alike, started now."""

    total: int
    start: float = field(default_factory=time.monotonic)

    def left(self, done: int) -> str:
        """``, 3 min left`` after some pieces; nothing before the first, or where little is left."""
        if not done:
            return ""
        seconds = (time.monotonic() - self.start) / done * (self.total - done)
        if seconds < SHORTEST:
            return ""
        return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"
