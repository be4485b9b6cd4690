from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from validation.render import render_html, render_markdown
from validation.render.heatmap import STEPS, Field, HeatMap
from validation.render.sensitivity import SensitivityView, view_sensitivity

Report = dict[str, Any]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def measured(report: Report, make_sensitivity: Callable[[int], Report]) -> Report:
    return report | {"sensitivity": [make_sensitivity(30)]}


def the_view(report: Report) -> SensitivityView:
    (view,) = view_sensitivity(report)
    return view


def test_summary_says_what_was_kept_and_what_costs_most(measured: Report) -> None:
    summary = the_view(measured).summary
    assert summary.startswith("119 of 120 linears are int8-smoothquant, 1 kept; 39.5\N{NARROW NO-BREAK SPACE}MB saved.")
    assert "Most sensitive, mean KL on 1,024 tokens: layer 1 down_proj 0.0123, layer" in summary


def test_every_linear_is_a_field_and_a_row_in_order(measured: Report) -> None:
    measured["sensitivity"][0]["linears"].reverse()
    view = the_view(measured)
    assert [cells[0] for _, cells in view.rows][:5] == [
        *(f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        "model.layers.1.self_attn.qkv_proj",
    ]
    (kept,) = [cells for is_kept, cells in view.rows if is_kept]
    spike = ("model.layers.1.mlp.down_proj", "kept", "0.0123", "2.00e-6", "0.00610", "24,265")
    assert kept == (*spike, "0\N{NARROW NO-BREAK SPACE}B", "alone it costs more than all others")
    for drawing in (view.wide, view.narrow):
        root = ET.fromstring(str(drawing))
        assert len([shape for shape in root.iter("rect") if "field" in shape.get("class", "")]) == 120
        assert len([shape for shape in root.iter("circle") if shape.get("class") == "kept"]) == 1
        assert "layer 1 down_proj: KL 0.0123 ± 2.00e-6\nkept: alone it costs more than all others" in [title.text for title in root.iter("title")]
        assert root.find("desc") is not None


def test_fields_stay_inside_the_picture_at_any_depth(make_sensitivity: Callable[[int], Report]) -> None:
    for layers in (1, 2, 30, 126):
        view = the_view({"sensitivity": [make_sensitivity(layers)]})
        for drawing in (view.wide, view.narrow):
            root = ET.fromstring(str(drawing))
            _, _, width, height = map(float, root.get("viewBox", "").split())
            for shape in root.iter("rect"):
                x, y, w, h = (float(shape.get(key, "nan")) for key in ("x", "y", "width", "height"))
                assert w > 0
                assert h > 0
                assert -0.1 <= x <= x + w <= width + 0.1
                assert -0.1 <= y <= y + h <= height + 0.1


def test_colours_follow_the_value_and_the_legend_says_which() -> None:
    values = [1e-6 * 10**step for step in range(5)]
    fields = {(layer, "o_proj"): Field(value, False, "") for layer, value in enumerate(values)}
    chart = HeatMap("k", "t", "d", ["o_proj"], 5, fields)
    steps = [chart.step(value) for value in values]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, STEPS - 1)
    assert len(chart.legend()) == STEPS
    assert chart.legend()[0][1].split(" to ")[1] == chart.legend()[1][1].split(" to ")[0]


@pytest.mark.parametrize("values", [[None, None], [0.0, 0.0], [0.5, 0.5], [None, 1e-5]])
def test_odd_values_are_drawn_too(values: list[float | None]) -> None:
    fields = {(layer, "o_proj"): Field(value, False, "said") for layer, value in enumerate(values)}
    chart = HeatMap("k", "t", "d", ["o_proj"], 3, fields)  # the third was not measured at all
    classes = [shape.get("class", "").split()[0] for shape in ET.fromstring(chart.wide()).iter("rect")]
    assert classes == ["unmeasured" if value is None else "field" for value in values]
    assert "nan" not in chart.wide() + chart.narrow()


def test_page_has_chart_legend_and_table_and_markdown_the_kept_ones(measured: Report) -> None:
    html = render_html(measured)
    assert 'aria-labelledby="sensitivity-0-wide-title sensitivity-0-wide-desc"' in html
    assert (html.count("kept weight-only"), html.count("kept in float")) == (1, 0)
    weight_only = measured | {"sensitivity": [entry | {"scheme": "int8"} for entry in measured["sensitivity"]]}
    assert render_html(weight_only).count("kept in float") == 1
    (table,) = [table for table in re.findall(r'<table class="data stack".*?</table>', html, flags=re.DOTALL) if "with this linear alone" in table]
    assert table.count('<tr role="row">') == 121
    markdown = render_markdown(measured)
    assert "### Sensitivity\n\n119 of 120 linears are int8-smoothquant" in markdown
    assert "| model.layers.1.mlp.down_proj | kept | 0.0123 | 2.00e-6 | 0.00610 | 24,265 |" in markdown
    assert "model.layers.2.mlp.down_proj |" not in markdown


def test_unknown_kinds_come_last(make_sensitivity: Callable[[int], Report]) -> None:
    entry = make_sensitivity(2)
    entry["linears"][0] |= {"kind": "a_router", "name": "model.layers.0.a_router"}
    assert list(the_view({"sensitivity": [entry]}).chart.kinds) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "a_router"]


def test_without_measurements_there_is_no_section(report: Report) -> None:
    assert "ensitivity" not in render_html(report | {"sensitivity": []})
    assert "ensitivity" not in render_markdown(report | {"sensitivity": [{"scheme": "int8", "tokens": 0, "linears": []}]})
