from __future__ import annotations

from html import unescape
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from validation.render import render_markdown
from validation.render.markdown import escape

HOSTILE = (
    "<script>alert(1)</script>", "a|b||c", "`code` ``", "]]>", "\x00\x1b[31m", "🦙👩‍💻", "x" * 5000,
    "line\n\n| a | b |\n# head", "**bold** _it_ ~~gone~~",
    "[a](javascript:alert(1))", "![i](http://evil.example/x.png)",
    "https://evil.example www.evil.example a@b.example", "\\| \\", "&lt;b&gt; &#124;", "$x$", "- x",
    "1. x", "+ x", "<!-- x", "{{ 7*7 }}", "\ud800", "\u202eevil", "# @user",
)  # fmt: skip


def parse(text: str) -> list[Token]:
    """Block and inline tokens as GitHub would see them: tables, strikethrough and raw HTML on."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def tables(text: str) -> list[list[int]]:
    """Cells of each row of each table, in raw source, escaped pipes not counted."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[line.count("|") - 1 for line in block] for block in blocks]


def test_markdown_has_the_verdict_on_top_then_what_failed(build_report: Any) -> None:
    lines = render_markdown(build_report(broken_layer=15)).splitlines()
    assert lines[0] == "## ❌ Parity failed: 5 of 7 stages ran, 2 not run"
    headings = [line for line in lines if line.startswith("#")]
    assert headings[1:] == ["### Failing checks", "### Stages", "### Quality", "### Warnings", "### Fusion", "### Engines", "### Not run"]
    (row,) = [line for line in lines if line.startswith("| fused | worst local ratio")]
    assert row.startswith("| fused | worst local ratio | layer 15 | 15.2 | ≤ 2 | a layer may add twice what rounding it adds")


def test_markdown_shows_each_number_with_its_gate(build_report: Any) -> None:
    text = render_markdown(build_report(broken_layer=15))
    (fused,) = [line for line in text.splitlines() if line.startswith("| ✗ **fused** ")]
    assert "| 15.2 ✗ ≤ 2 |" in fused
    assert "✓ decisive 0" in fused
    (int8,) = [line for line in text.splitlines() if line.startswith("| ✓ **int8** ")]
    assert "± 0.0" in int8
    assert "✓ ≤ 1" in int8


@pytest.mark.parametrize(("passed", "icon"), [(True, "✅"), (False, "❌"), (None, "⚪")])
def test_markdown_verdict_has_an_icon(build_report: Any, passed: bool | None, icon: str) -> None:
    assert render_markdown(build_report(passed=passed)).startswith(f"## {icon} Parity ")


def test_markdown_of_no_stages_says_so(build_report: Any) -> None:
    assert "### Stages\n\nNo stage ran." in render_markdown(build_report(stages=0))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_escaped_text_is_text_and_nothing_else(text: str) -> None:
    tokens = parse(f"| a | b |\n| --- | --- |\n| {escape(text)} | end |\n\nhead {escape(text)}")
    kinds = {token.type for token in tokens}
    assert kinds <= {
        *(f"{name}_{end}" for name in ("table", "thead", "tbody", "tr", "th", "td", "paragraph") for end in ("open", "close")),
        "inline", "text", "text_special",
    }  # fmt: skip
    inline = [token.content for token in tokens if token.type == "inline"]
    assert (len(inline), inline[3]) == (5, "end")
    assert len(inline[2]) < 1000


@pytest.mark.parametrize("text", ["<b> a|b `c` *d* _e_", "model_name.weight-1", "a & b; &amp;"])
def test_escaped_text_reads_as_it_was(text: str) -> None:
    assert unescape(escape(text)) == text


def test_escape_leaves_plain_names_readable() -> None:
    assert escape("model.layers.3.self_attn.q_proj a100-80gb-fp16") == "model.layers.3.self_attn.q_proj a100-80gb-fp16"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_break_no_table(build_report: Any, make_sensitivity: Any, text: str) -> None:
    report = build_report(broken_layer=3)
    report["model"]["name"] = report["headline"] = report["stages"][1]["stage"] = report["engines"][0]["file"] = text
    report["sensitivity"] = [make_sensitivity(4)]
    report["sensitivity"][0]["scheme"] = report["sensitivity"][0]["linears"][7]["reason"] = text
    report["sensitivity"][0]["linears"][7] |= {"name": text, "kind": text}
    for stage in (report["float16"], *report["stages"][:3]):
        stage["quality"]["texts"][1]["text"] = text
    report["not_run"][0]["reason"] = report["text"]["name"] = report["floor"]["reason"] = text
    for check in report["stages"][1]["checks"]:
        check |= {"where": text, "reason": text, "passed": False}
    rendered = render_markdown(report)
    assert [sorted(set(widths)) for widths in tables(rendered)] == [[6], [12], [5], [5], [5], [8], [5], [7]]
    assert not {"html_block", "html_inline", "link_open", "image", "code_inline", "fence"} & {token.type for token in parse(rendered)}
    rendered.encode()


def test_a_large_report_is_short_enough_for_a_job_summary(build_report: Any) -> None:
    """GitHub takes 1 MiB a step; people read less."""
    assert len(render_markdown(build_report(stages=7, layers=80)).encode()) < 32_000
