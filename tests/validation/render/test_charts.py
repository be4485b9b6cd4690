from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from validation.render.charts import NARROW, STYLES, WIDE, Frame, LineChart, Reference, Series


def chart(*series: Series, references: tuple[Reference, ...] = (), first: int = 0, mark_worst: bool = True) -> LineChart:
    return LineChart("local", "Error", "layer", series, references, first, mark_worst)


def drawn(made: LineChart, frame: Frame = WIDE) -> ET.Element:
    return ET.fromstring(made.svg(frame))


def texts(root: ET.Element, style: str) -> list[str]:
    return [text.text or "" for text in root.iter("text") if style in (text.get("class") or "").split()]


def points(root: ET.Element, style: str) -> list[tuple[float, float]]:
    path = next(path for path in root.iter("path") if path.get("class") == f"series {style}")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))]


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_chart_draws_each_value_at_its_height(frame: Frame) -> None:
    made = chart(Series("traced", [1.0, 2.0, 0.5]))
    scale = made.scale()
    found = points(drawn(made, frame), "s0")
    assert [y for _, y in found] == pytest.approx([scale.at(value, frame.y) for value in (1.0, 2.0, 0.5)], abs=0.06)
    assert all(frame.left <= x <= frame.x[1] for x, _ in found)
    assert [x for x, _ in found] == sorted(x for x, _ in found)


def test_chart_says_in_words_what_it_shows() -> None:
    root = drawn(chart(Series("fused", [0.8, 15.2, 0.9]), references=(Reference("limit", 2.0),)))
    labels = (root.get("aria-labelledby") or "").split()
    assert [element.get("id") for element in (root.find("title"), root.find("desc")) if element is not None] == labels
    assert root.findtext("desc") == "fused: at most 15.2 in layer 1; limit at 2.00."


def test_chart_labels_the_worst_layer_and_the_limit() -> None:
    root = drawn(chart(Series("traced", [0.7, 0.8]), Series("fused", [0.8, 15.2]), references=(Reference("limit", 2.0),)))
    assert texts(root, "worst-label") == ["fused, layer 1: 15.2"]
    assert texts(root, "limit-label") == ["limit 2"]


def test_chart_labels_what_is_beyond_its_limit_before_what_is_merely_large() -> None:
    root = drawn(chart(Series("int8", [9.0, 8.0]), Series("fused", [0.8, 3.0], limit=2.0)))
    assert texts(root, "worst-label") == ["fused, layer 1: 3.00"]


def test_chart_counts_steps_from_one() -> None:
    root = drawn(chart(Series("traced", [0.1, 0.4]), first=1))
    assert texts(root, "worst-label") == ["traced, layer 2: 0.400"]


def test_chart_leaves_a_gap_where_nothing_was_measured() -> None:
    root = drawn(chart(Series("traced", [1.0, 1.0, None, 1.0, None, 1.0, 1.0])))
    path = next(path for path in root.iter("path") if path.get("class") == "series s0")
    assert path.get("d", "").count("M") == 3
    assert [circle.get("class") for circle in root.iter("circle")].count("point s0") == 1


def test_chart_of_one_layer_is_a_dot_in_the_middle() -> None:
    root = drawn(chart(Series("traced", [0.9])))
    dot = next(circle for circle in root.iter("circle") if circle.get("class") == "point s0")
    assert float(dot.get("cx", "0")) == pytest.approx(sum(WIDE.x) / 2)


def test_chart_tells_seven_stages_of_eighty_layers_apart() -> None:
    made = chart(*(Series(f"stage-{index}", [1.0 + 0.01 * index] * 80) for index in range(7)))
    root = drawn(made)
    assert STYLES == 7
    assert {path.get("class") for path in root.iter("path")} >= {f"series s{index}" for index in range(7)}
    places = [float(text.get("y", "0")) for text in root.iter("text") if text.get("class") == "name"]
    assert texts(root, "name") == [f"stage-{index}" for index in range(7)]
    ordered = sorted(places)
    assert min(after - before for before, after in pairwise(ordered)) >= 15.9
    assert len(texts(root, "tick-label")) <= 20


def test_chart_shows_the_numbers_of_a_layer_when_pointed_at() -> None:
    root = drawn(chart(Series("traced", [0.7, None]), Series("fused", [0.8, 15.2])))
    assert [column.findtext("title") for column in root.iter("rect")] == ["layer 0\ntraced: 0.700\nfused: 0.800", "layer 1\ntraced: –\nfused: 15.2"]


def test_chart_escapes_names() -> None:
    text = chart(Series("<script>&\x00", [1.0])).svg(WIDE)
    assert "<script>" not in text
    assert "<script>&: 1.00" in "".join(ET.fromstring(text).itertext())


@pytest.mark.parametrize("values", [[], [None, None]])
def test_chart_of_nothing_measured_still_draws_axes(values: list[float | None]) -> None:
    made = chart(Series("traced", values))
    assert not made.measured
    assert drawn(made).find("title") is not None
