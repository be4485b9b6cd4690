"""A number for each layer and kind of linear as a coloured field, inline SVG; wide: layers across, narrow: layers down.

Seven steps of one colour from pale to strong (dark page: from dim to bright) differ in lightness, so they can be told apart in grey and by eyes that
see few colours; what was kept carries a ring as well, and what was not measured is empty with a dashed edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from validation.render.scales import Scale, index_ticks, scale_for
from validation.render.svg import add, icon, picture, text_of, write
from validation.render.wording import clean, number, shorten

STEPS = 7
WIDE_WIDTH, NARROW_WIDTH = 1040, 360
WIDE_ROW, NARROW_ROW = 34, 15
LEFT, TOP = 104, 26


@dataclass(frozen=True)
class Field:
    """One linear: its value (None: not measured), whether it was kept out of the scheme, and what is said of it when it is pointed at."""

    value: float | None
    kept: bool
    said: str


@dataclass(frozen=True)
class HeatMap:
    """Fields by (layer, kind).

    Attributes:
        key: unique on the page.
        kinds: rows of the wide form, in order.
        layers: how many.
    """

    key: str
    title: str
    description: str
    kinds: Sequence[str]
    layers: int
    fields: Mapping[tuple[int, str], Field]

    def scale(self) -> Scale:
        """From the smallest to the largest value."""
        return scale_for([field.value for field in self.fields.values() if field.value is not None])

    def step(self, value: float) -> int:
        """Which of the seven colours."""
        return min(STEPS - 1, int(self.scale().at(value, (0, STEPS))))

    def legend(self) -> list[tuple[str, str]]:
        """(a field of each colour as markup, the values that it stands for), the kept mark last."""
        scale = self.scale()
        edges = [_value_at(scale, step / STEPS) for step in range(STEPS + 1)]
        return [(sample(f"h{step}"), f"{number(edges[step], digits=2)} to {number(edges[step + 1], digits=2)}") for step in range(STEPS)]

    def wide(self) -> str:
        """Layers across."""
        root = picture(WIDE_WIDTH, TOP + WIDE_ROW * len(self.kinds) + 44, f"{self.key}-wide", self.title, self.description)
        size = (WIDE_WIDTH - LEFT) / max(self.layers, 1), float(WIDE_ROW)
        for row, kind in enumerate(self.kinds):
            write(root, shorten(kind, 14), LEFT - 10, TOP + (row + 0.5) * WIDE_ROW + 4, "name", "end")
            for layer in range(self.layers):
                self._draw(root, (layer, kind), (LEFT + layer * size[0], TOP + row * size[1]), size)
        bottom = TOP + WIDE_ROW * len(self.kinds)
        for layer in index_ticks(self.layers, 0, most=16):
            write(root, str(layer), LEFT + (layer + 0.5) * size[0], bottom + 18, "tick-label", "middle")
        write(root, "layer", LEFT, bottom + 38, "axis-label", "start")
        return text_of(root)

    def narrow(self) -> str:
        """Layers down."""
        left = 40
        root = picture(NARROW_WIDTH, TOP + NARROW_ROW * self.layers + 8, f"{self.key}-narrow", self.title, self.description)
        size = (NARROW_WIDTH - left) / max(len(self.kinds), 1), float(NARROW_ROW)
        write(root, "layer", 0, TOP - 10, "axis-label", "start")
        for column, kind in enumerate(self.kinds):
            write(root, shorten(kind, 12), left + (column + 0.5) * size[0], TOP - 10, "name", "middle")
            for layer in range(self.layers):
                self._draw(root, (layer, kind), (left + column * size[0], TOP + layer * size[1]), size)
        for layer in index_ticks(self.layers, 0, most=16):
            write(root, str(layer), left - 8, TOP + (layer + 0.5) * size[1] + 4, "tick-label", "end")
        return text_of(root)

    def _draw(self, root: ET.Element, at: tuple[int, str], place: tuple[float, float], size: tuple[float, float]) -> None:
        """A field with a gap of ground around it, and a ring where the linear was kept."""
        field = self.fields.get(at)
        if field is None:
            return
        style = "unmeasured" if field.value is None else f"field h{self.step(field.value)}"
        gap = 1.0 if min(size) > 6 else 0.25
        box = add(root, "rect", style, x=place[0] + gap, y=place[1] + gap, width=size[0] - 2 * gap, height=size[1] - 2 * gap, rx=2)
        ET.SubElement(box, "title").text = clean(field.said)
        if field.kept:
            add(root, "circle", "kept", cx=place[0] + size[0] / 2, cy=place[1] + size[1] / 2, r=max(1.5, min(4.5, min(size) / 2 - 2)))


def sample(style: str, *, kept: bool = False) -> str:
    """A small field for the legend."""
    root = icon("swatch field-swatch", 16, 12)
    add(root, "rect", f"field {style}", x=0, y=0, width=16, height=12, rx=2)
    if kept:
        add(root, "circle", "kept", cx=8, cy=6, r=3.5)
    return text_of(root)


def _value_at(scale: Scale, fraction: float) -> float:
    if scale.logarithmic:
        return float(scale.low * (scale.high / scale.low) ** fraction)
    return scale.low + fraction * (scale.high - scale.low)
