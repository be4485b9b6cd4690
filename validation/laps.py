"""How long one thing after the other took."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)


class Laps:
    """Seconds of each, from now on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, what: str) -> None:
        """What ran since the last lap."""
        now = time.perf_counter()
        self.seconds[what] = round(now - self._start, 2)
        logger.info("%s: %.1f s", what, now - self._start)
        self._start = now
