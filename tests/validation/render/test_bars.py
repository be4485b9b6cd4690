from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from validation.render.bars import FULL, WIDTH, interval, range_bar, range_state


@pytest.mark.parametrize(
    ("fraction", "style", "width"),
    [(0.37, "fill", 0.37 * FULL), (0.75, "warning", 0.75 * FULL), (1.0, "overflows", FULL), (40.0, "overflows", 1.1 * FULL)],
)
def test_range_bar_is_as_long_as_its_share(fraction: float, style: str, width: float) -> None:
    _, bar = ET.fromstring(range_bar(fraction)).iter("rect")
    assert bar.get("class") == style
    assert float(bar.get("width", "0")) == pytest.approx(width, abs=0.06)
    assert float(bar.get("width", "0")) <= WIDTH


@pytest.mark.parametrize("fraction", [None, 0.0])
def test_range_bar_of_nothing_is_an_empty_track(fraction: float | None) -> None:
    assert [rect.get("class") for rect in ET.fromstring(range_bar(fraction)).iter("rect")] == ["track"]


@pytest.mark.parametrize(("fraction", "state"), [(0.5, None), (0.501, "warning"), (0.999, "warning"), (1.0, "overflows")])
def test_range_state_follows_the_audit(fraction: float, state: str | None) -> None:
    assert range_state(fraction) == state


def test_interval_draws_two_standard_errors_around_the_value() -> None:
    root = ET.fromstring(interval(0.5, 0.1, 1.0, (0.0, 1.0)))
    whisker = next(line for line in root.iter("line") if line.get("class") == "whisker")
    scale = WIDTH - 8
    assert [float(whisker.get(key, "0")) for key in ("x1", "x2")] == pytest.approx([4 + 0.3 * scale, 4 + 0.7 * scale], abs=0.06)
    assert float(next(root.iter("circle")).get("cx", "0")) == pytest.approx(4 + 0.5 * scale, abs=0.06)
    assert [line.get("class") for line in root.iter("line")] == ["track-line", "tick", "limit", "whisker"]


def test_interval_without_a_value_or_limit_is_an_axis() -> None:
    root = ET.fromstring(interval(None, None, None, (0.0, 1.0)))
    assert [line.get("class") for line in root] == ["track-line", "tick"]
