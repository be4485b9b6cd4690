"""Small charts as inline SVG, without scripts or external parts: lines over an index (layers, decode steps).

Colours are CSS classes (`s0`, `limit` …) of the page, which knows light, dark and print; a line is told apart by its dashes and its name as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from validation.render.scales import Scale, index_ticks, scale_for, spread
from validation.render.svg import add, icon, picture, text_of, write
from validation.render.wording import clean, number, shorten, trimmed

STYLES = 7
"""Line styles (colour and dashes) that the page defines; further lines start again."""

MOST_LABELS = 3
"""Points of a chart that get a name; the table below it has the others."""

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line: its name, a value per index (None: not measured, a gap), and the limit it must keep, if any."""

    name: str
    values: Numbers
    limit: float | None = None


@dataclass(frozen=True)
class Reference:
    """A horizontal line to read the others against: a limit, the floor."""

    name: str
    value: float


@dataclass(frozen=True)
class Frame:
    """Size of a chart in px, and its margins; names stand at the ends of the lines where there is room for them."""

    width: int
    height: int
    left: int
    right: int
    top: int = 26
    bottom: int = 40
    named: bool = True

    @property
    def x(self) -> tuple[float, float]:
        """Left and right edge of the plot."""
        return self.left, self.width - self.right

    @property
    def y(self) -> tuple[float, float]:
        """Bottom and top edge of the plot (SVG counts downwards)."""
        return self.height - self.bottom, self.top


WIDE = Frame(width=1040, height=330, left=52, right=150)
NARROW = Frame(width=360, height=270, left=44, right=10, named=False)


@dataclass(frozen=True)
class LineChart:
    """Lines over a shared index: layers or decode steps.

    ``first`` is the number of the first index (layers count from 0, steps from 1); ``unit`` names one index ("layer").
    """

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    first: int = 0
    mark_worst: bool = True

    @property
    def length(self) -> int:
        """Indices of the longest line."""
        return max((len(line.values) for line in self.series), default=0)

    @property
    def measured(self) -> bool:
        """Is there a single number to draw?"""
        return any(value is not None for line in self.series for value in line.values)

    def worst(self, line: Series) -> tuple[int, float] | None:
        """(index as people count it, value) of a line's largest value."""
        points = [(value, -index) for index, value in enumerate(line.values) if value is not None]
        return (self.first - max(points)[1], max(points)[0]) if points else None

    def labelled(self) -> list[tuple[int, float, str]]:
        """(index, value, line) of what deserves a name: the worst of each line beyond its limit; where none is, the worst of all."""
        found = [(worst, line) for line in self.series if (worst := self.worst(line))]
        beyond = [(worst, line) for worst, line in found if line.limit is not None and worst[1] > line.limit]
        by_index = {worst[0]: (*worst, line.name) for worst, line in sorted(beyond or found, key=lambda item: item[0][1])}
        return sorted(by_index.values(), key=lambda point: -point[1])[: MOST_LABELS if beyond else 1]

    def description(self) -> str:
        """What the chart shows, in words, for who can't see it."""
        lines = [f"{line.name}: at most {number(worst[1])} in {self.unit} {worst[0]}" for line in self.series if (worst := self.worst(line))]
        return "; ".join([*lines, *(f"{line.name} at {number(line.value)}" for line in self.references)]) + "."

    def scale(self) -> Scale:
        """The value axis: linear from zero, logarithmic where the values span more than a factor 8."""
        values = [value for line in self.series for value in line.values if value is not None]
        return scale_for([*values, *(line.value for line in self.references)])

    def svg(self, frame: Frame) -> str:
        """The chart at one size; the page shows the one that fits."""
        root = picture(frame.width, frame.height, f"{self.key}-{frame.width}", self.title, self.description())
        scale = self.scale()
        _axes(root, self, scale, frame)
        ends = [_line(root, style, line, self, scale, frame) for style, line in enumerate(self.series)]
        _references(root, self.references, scale, frame)
        if self.mark_worst:
            _worst(root, self, scale, frame)
        if frame.named:
            _names(root, self.series, ends, frame)
            _columns(root, self, frame)
        return text_of(root)


def swatch(style: int) -> str:
    """A short piece of a line for a legend."""
    root = icon("swatch", 28, 8)
    add(root, "path", f"series s{style % STYLES}", d="M1 4H27")
    return text_of(root)


def _axes(root: ET.Element, chart: LineChart, scale: Scale, frame: Frame) -> None:
    for tick in scale.ticks():
        y = scale.at(tick, frame.y)
        add(root, "line", "grid", x1=frame.left, x2=frame.x[1], y1=y, y2=y)
        write(root, trimmed(tick), frame.left - 8, y + 4, "tick-label", "end")
    add(root, "line", "axis", x1=frame.left, x2=frame.x[1], y1=frame.y[0], y2=frame.y[0])
    for index in index_ticks(chart.length, chart.first, most=12 if frame.named else 6):
        write(root, str(index), _x(index - chart.first, chart, frame), frame.y[0] + 18, "tick-label", "middle")
    write(root, chart.unit, frame.left, frame.height - 5, "axis-label", "start")


def _x(index: int, chart: LineChart, frame: Frame) -> float:
    left, right = frame.x
    return (left + right) / 2 if chart.length == 1 else left + 6 + (right - left - 12) * index / (chart.length - 1)


def _line(root: ET.Element, style: int, line: Series, chart: LineChart, scale: Scale, frame: Frame) -> float | None:
    """Draw a line with a gap at each None, and a dot for a value that stands alone; returns y of its last point."""
    points = [None if v is None else (_x(i, chart, frame), scale.at(v, frame.y)) for i, v in enumerate(line.values)]
    path, last = "", None
    for index, point in enumerate(points):
        if point is not None:
            path += f"{'M' if last is None else 'L'}{point[0]:.1f} {point[1]:.1f}"
            if last is None and (index + 1 == len(points) or points[index + 1] is None):
                add(root, "circle", f"point s{style % STYLES}", cx=point[0], cy=point[1], r=3)
        last = point
    add(root, "path", f"series s{style % STYLES}", d=path)
    return next((point[1] for point in reversed(points) if point), None)


def _references(root: ET.Element, references: Sequence[Reference], scale: Scale, frame: Frame) -> None:
    for reference in references:
        y = scale.at(reference.value, frame.y)
        add(root, "line", "limit", x1=frame.left, x2=frame.x[1], y1=y, y2=y)
        write(root, f"{reference.name} {trimmed(reference.value)}", frame.left + 6, y - 6, "limit-label halo", "start")


def _worst(root: ET.Element, chart: LineChart, scale: Scale, frame: Frame) -> None:
    """A ring and a name on the points that deserve one."""
    points = [(_x(index - chart.first, chart, frame), scale.at(value, frame.y), index, value, name) for index, value, name in chart.labelled()]
    places = spread([y - 7 for _, y, *_ in points], 15, 12, frame.y[0])
    for (x, y, index, value, name), place in zip(points, places, strict=True):
        anchor = "end" if x > sum(frame.x) / 2 else "start"
        add(root, "circle", "ring", cx=x, cy=y, r=5)
        text = f"{shorten(name, 24)}, {chart.unit} {index}: {number(value)}"
        write(root, text, x + (-9 if anchor == "end" else 9), place, "worst-label halo", anchor)


def _names(root: ET.Element, series: Sequence[Series], ends: Sequence[float | None], frame: Frame) -> None:
    """The name of each line at its end, moved apart where lines meet, with a thin leader to the line."""
    shown = [(style, line, y) for style, (line, y) in enumerate(zip(series, ends, strict=True)) if y is not None]
    places = spread([y for _, _, y in shown], 16, frame.top, frame.y[0])
    edge = frame.x[1]
    for (style, line, y), place in zip(shown, places, strict=True):
        add(root, "path", f"leader s{style % STYLES}", d=f"M{edge - 4:.1f} {y:.1f}L{edge + 8:.1f} {place:.1f}H{edge + 22:.1f}")
        add(root, "path", f"series s{style % STYLES}", d=f"M{edge + 8:.1f} {place:.1f}H{edge + 32:.1f}")
        write(root, shorten(line.name, 16), edge + 38, place + 4, "name", "start")


def _columns(root: ET.Element, chart: LineChart, frame: Frame) -> None:
    """An invisible column per index that shows all values of the index when pointed at: no script needed."""
    step = (frame.x[1] - frame.left) / max(chart.length, 1)
    for index in range(chart.length):
        column = add(root, "rect", "hit", x=frame.left + index * step, y=frame.top, width=step, height=frame.y[0] - frame.top)
        values = [f"{line.name}: {number(line.values[index])}" for line in chart.series if index < len(line.values)]
        ET.SubElement(column, "title").text = clean("\n".join([f"{chart.unit} {index + chart.first}", *values]))
