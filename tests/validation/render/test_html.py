from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from validation.render import render_html

VOID = {"meta", "wbr", "br", "img", "input", "link", "hr"}
HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title><b>", "' onmouseover='x", "a|b `c` ]]>", "\x00\x1b[31m\u202e",
    "🦙👩‍💻", "x" * 5000, "{{ 1111*1111 }}{% raw %}", "\ud800", "<!--", "&lt;script&gt;",
)  # fmt: skip


class Page(HTMLParser):
    """A page taken apart: open tags must close in order; text, attributes and tables are kept."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


def replaced(value: Any, text: str, *, keep: tuple[str, ...] = ("comparison",)) -> Any:
    """The report with every string, and every key a stranger chooses, replaced by ``text``."""
    if isinstance(value, dict):
        free = not value.keys() & {"schema", "name", "stage", "check", "file", "scenario", "mean_abs", "verified", "audit", "sha256", "checks"}
        free &= not value.keys() & {"outside", "first", "kind"}  # a plan's layers
        free &= not value.keys() & {"quality", "all", "tokens", "interval", "perplexity_pct", "scheme"}  # quality and sensitivity
        return {(f"{text}{index}" if free else key): item if key in keep else replaced(item, text) for index, (key, item) in enumerate(value.items())}
    if isinstance(value, list):
        return [replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


def test_page_has_the_verdict_on_top_and_the_headline(build_report: Callable[..., dict[str, Any]]) -> None:
    page = Page(render_html(build_report(broken_layer=15)))
    start = page.text.index("failed: 5 of 7 stages ran, 2 not run", 60)
    assert (
        start
        < page.text.index("fused does not match: worst_local_ratio 15.2 in layer 15")
        < page.text.index("What failed")
        < page.text.index("Not run")
    )


def test_page_shows_each_number_beside_its_gate(build_report: Callable[..., dict[str, Any]]) -> None:
    html = render_html(build_report(broken_layer=15))
    (cell,) = re.findall(r'<td role="cell" class="n failed".*?</td>', html, flags=re.DOTALL)
    assert " ".join(Page(cell).texts).split() == ["15.2", "layer", "15", "·", "✗", "≤", "2"]
    assert 'data-label="Worst local ratio"' in cell


def test_page_loads_nothing_and_runs_nothing(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "style"} & {name for _, name, _ in page.attributes}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")


@pytest.mark.parametrize("sizes", [{}, {"stages": 0}, {"stages": 1, "layers": 1}, {"stages": 7, "layers": 80, "broken_layer": 79}])
def test_page_is_well_formed_and_its_references_resolve(build_report: Callable[..., dict[str, Any]], sizes: dict[str, int]) -> None:
    page = Page(render_html(build_report(**sizes)))
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))
    assert {name for value in page.values("aria-labelledby") for name in value.split()} <= set(identifiers)
    assert page.tags.count("table") == page.tags.count("caption")
    assert page.tags.count("h1") == 1
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_page_keeps_seven_stages_and_eighty_layers_readable(build_report: Callable[..., dict[str, Any]]) -> None:
    html = render_html(build_report(stages=7, layers=80))
    stages = re.findall(r'<table class="data stages stack".*?</table>', html, flags=re.DOTALL)
    assert [table.count('role="row"') for table in stages] == [8]
    (layers,) = [table for table in re.findall(r'<table class="data dense">.*?</table>', html, flags=re.DOTALL) if "Error each layer adds" in table]
    assert (layers.count("<tr>"), layers.count("<td")) == (81, 5 * 80)  # engine graphs have no local ratios
    assert len(html) < 300_000


@pytest.mark.parametrize(("passed", "mark"), [(True, "✓"), (False, "✗"), (None, "—")])
def test_page_verdict_is_more_than_a_colour(build_report: Callable[..., dict[str, Any]], passed: bool | None, mark: str) -> None:
    assert f'<span class="seal" aria-hidden="true">{mark}</span>' in render_html(build_report(passed=passed))


def test_page_shows_null_as_not_measured(build_report: Callable[..., dict[str, Any]]) -> None:
    report = build_report(stages=1)
    stage = {key: None if isinstance(value, float | int | list) and key != "passed" else value for key, value in report["stages"][0].items()}
    report["stages"] = [stage | {"passed": None}]
    report["floor"] = {"mean_abs": None, "max_abs": None, "source": "transformers", "reason": "float16 overflows in layer 3"}
    html = render_html(report)
    page = Page(html)
    assert html.count('<span class="missing" title="not measured">–</span>') == 11
    assert "None" not in page.text
    assert "nan" not in page.text
    assert "float16 overflows in layer 3" in page.text
    assert "Error each layer adds" not in page.text


def test_page_names_an_overflow(report: dict[str, Any]) -> None:
    report["stages"][0] |= {"range_peak": 1.31, "range_tensor": "model.layers.3.mlp.down_proj"}
    page = Page(render_html(report))
    assert "131 % overflows" in page.text.replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_page_draws_the_floor_and_the_limits(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    assert "float16 floor 0.0123" in page.text
    assert "limit 2" in page.text
    report["floor"]["mean_abs"] = None
    assert "float16 floor 0.0123" not in Page(render_html(report)).text


def test_page_shows_kernels_profiles_and_hashes(report: dict[str, Any]) -> None:
    text = Page(render_html(report)).text
    assert "sm80_xmma_gemm_f16f16_f16f32 120" in text
    assert "prefill sequence_length 1, 512, 4096" in text
    assert f"fused.onnx {'1a' * 32}" in text
    assert "gpu –" in text


def test_page_shows_what_each_layer_of_a_plan_runs(report: dict[str, Any]) -> None:
    assert "decode layers 0–29 (30 alike) 2 gemm half · attention" in Page(render_html(report)).text
    for engine in report["engines"]:
        del engine["kernels_by_layer"]  # as older builds left it
    assert "the kernels of one pass" not in Page(render_html(report)).text


def test_page_writes_shapes_of_named_records_on_one_line(report: dict[str, Any]) -> None:
    report["engines"][0]["profiles"] = [{"name": "prefill", "input_ids": [[1, 1], [1, 512], [4, 4096]]}]
    assert "prefill input_ids 1×1, 1×512, 4×4096" in Page(render_html(report)).text


def test_page_and_tooltips_say_why_a_number_is_missing(report: dict[str, Any]) -> None:
    stage = report["stages"][0]
    stage["noise_ratio"] = None
    stage["checks"][0] |= {"value": None, "passed": None, "reason": "not judged: no floor: it is not finite"}
    assert '<span class="missing" title="not judged: no floor: it is not finite">–</span>' in render_html(report)


def test_page_shows_warnings_with_their_stage(report: dict[str, Any]) -> None:
    assert "Warnings fused model.layers.2.mlp.down_proj reaches 61 % of float16's range" in Page(render_html(report)).text


def test_page_of_a_bare_report_is_a_page() -> None:
    page = Page(render_html({"passed": None, "verdict": "not judged: 0 of 0 stages ran", "headline": "nothing to compare", "stages": []}))
    assert "No stage ran." in page.text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_strings_stay_text(build_report: Callable[..., dict[str, Any]], make_sensitivity: Callable[[int], dict[str, Any]], text: str) -> None:
    whole = build_report(broken_layer=3) | {"sensitivity": [make_sensitivity(30)]}
    html = render_html(replaced(whole, text))
    page = Page(html)
    known = Page(render_html(whole))
    assert set(page.tags) <= set(known.tags)
    assert {name for _, name, _ in page.attributes} <= {name for _, name, _ in known.attributes}
    assert "1234321" not in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800]", html)
    html.encode()


def test_hostile_names_reach_the_page_unharmed(report: dict[str, Any]) -> None:
    name = "<b>llama</b> & `x` | {{ y }} 🦙"
    report["model"]["name"] = name
    assert name in Page(render_html(report)).text
