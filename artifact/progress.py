"""How a long step says what it is doing, without knowing who listens (a bar, plain lines, nobody)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: what is being done, and how many of how many units are finished."""


def silent(what: str, done: int, total: int) -> None:
    """A progress that nobody watches."""
