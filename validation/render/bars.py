"""Bars beside a number: the share of the float16 range used, and a value with its standard error."""

from __future__ import annotations

from validation.render.scales import Scale
from validation.render.svg import add, icon, text_of

RANGE_WARNING = 0.5
"""Share of 65504 above which the range audit warns (design: from 1.0 it fails)."""

WIDTH, FULL = 160, 144
"""Width of a bar, and of 100 % of the range, in px."""


def range_bar(fraction: float | None) -> str:
    """A bar of the float16 range used, 0 to 110 % of 65504, with the warning at 50 % and the failure at 100 %."""
    root = icon("bar", WIDTH, 14)
    add(root, "rect", "track", x=0, y=4, width=FULL, height=6, rx=3)
    if fraction:
        add(root, "rect", range_state(fraction) or "fill", x=0, y=4, width=max(2.0, min(fraction, 1.1) * FULL), height=6, rx=3)
    for tick in (FULL / 2, FULL):
        add(root, "line", "tick", x1=tick, x2=tick, y1=0, y2=14)
    return text_of(root)


def range_state(fraction: float) -> str | None:
    """``overflows`` from 100 % of the float16 range on, ``warning`` above 50 %, otherwise None."""
    return "overflows" if fraction >= 1 else "warning" if fraction > RANGE_WARNING else None


def interval(value: float | None, error: float | None, limit: float | None, span: tuple[float, float]) -> str:
    """A value with ± 2 standard errors on an axis from ``span[0]`` to ``span[1]``; zero is thin, the limit strong."""
    root = icon("bar", WIDTH, 14)
    axis = Scale(span[0], span[1], logarithmic=False)
    edges = (4.0, WIDTH - 4.0)
    add(root, "line", "track-line", x1=edges[0], x2=edges[1], y1=7, y2=7)
    for at, style in ((0.0, "tick"), (limit, "limit")):
        if at is not None:
            x = axis.at(at, edges)
            add(root, "line", style, x1=x, x2=x, y1=0, y2=14)
    if value is not None:
        low, high = (axis.at(value + sign * 2 * (error or 0.0), edges) for sign in (-1, 1))
        add(root, "line", "whisker", x1=low, x2=high, y1=7, y2=7)
        add(root, "circle", "dot", cx=axis.at(value, edges), cy=7, r=3.5)
    return text_of(root)
