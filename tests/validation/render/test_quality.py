from __future__ import annotations

import re
from typing import Any

import pytest

from validation.render import render_html, render_markdown
from validation.render.quality import Cell, describe, view_quality

Report = dict[str, Any]
SPACE = "\N{NARROW NO-BREAK SPACE}"


def rows_of(report: Report, table: int = 0) -> dict[str, list[Cell]]:
    view = view_quality(report)
    assert view is not None
    return dict(view.tables[table].rows)


def test_float16_stands_before_the_stages_so_that_int8_is_seen_beside_it(report: Report) -> None:
    view = view_quality(report)
    assert view is not None
    assert view.columns == ["float16", "traced", "fused", "int8"]  # engine graphs are compared with their stages
    assert [table.caption.split(":")[0] for table in view.tables] == ["All texts together", "default.txt", "code.txt"]
    assert {len(cells) for table in view.tables for _, cells in table.rows} == {4}


def test_numbers_stand_with_their_intervals_and_noise_is_said_in_words(report: Report) -> None:
    scope = report["stages"][2]["quality"]["all"]
    scope |= {
        "perplexity_increase_pct": 0.1,
        "perplexity_se_pct": 0.26,
        "perplexity_interval_pct": [-0.397, 0.613],
        "perplexity_noise": "inside noise",
    }
    scope |= {"mean_kl": 0.00293, "kl_interval": [0.00265, 0.00329], "p99_kl": 0.019, "top1_agreement": 0.975, "top1_interval": [0.968, 0.981]}
    rows = rows_of(report)
    assert rows["Increase over float32"][3] == Cell(f"+0.10 ± 0.26{SPACE}%", (f"−0.40{SPACE}% to +0.61{SPACE}%", "inside noise"))
    assert rows["Mean KL"][3] == Cell("0.00293", ("0.00265 to 0.00329",))
    assert rows["99th percentile KL"][3] == Cell("0.0190")
    assert rows["Top-1"][3] == Cell(f"97.5{SPACE}%", (f"96.8{SPACE}% to 98.1{SPACE}%",))
    scope["against_float16"]["top1_agreement"]["noise"] = "inside noise"
    assert describe(scope) == (
        f"perplexity +0.10 ± 0.26{SPACE}%, inside noise; mean KL 0.00293, above float16’s own, beyond noise; "
        f"top-1 97.5{SPACE}%, inside noise of float16’s own"
    )


def test_greedy_text_says_where_it_parts(report: Report) -> None:
    for prompt in report["stages"][0]["quality"]["greedy"]:
        prompt["diverges_at"] = None
    cells = rows_of(report)["Greedy tokens as float32’s"]
    assert cells == [
        Cell("–"), Cell("all", ("of 2 × 48",)), *[Cell("1 of 2 whole", ("first differs at token none, 13",))] * 2
    ]  # fmt: skip


def test_greedy_text_that_was_not_compared_says_why(report: Report) -> None:
    for stage in report["stages"][:3]:
        stage["quality"] |= {"greedy": None, "greedy_missing": "the reference is too large"}
    view = view_quality(report)
    assert view is not None
    assert view.how.endswith("Greedy continuations were not compared: the reference is too large.")
    assert "Greedy tokens as float32’s" not in rows_of(report)


def test_one_text_needs_no_table_of_all(report: Report) -> None:
    for stage in (report["float16"], *report["stages"][:3]):
        stage["quality"]["texts"] = stage["quality"]["texts"][:1]
    view = view_quality(report)
    assert view is not None
    assert [table.caption.split(":")[0] for table in view.tables] == ["default.txt"]


def test_windows_and_bos_are_said(report: Report) -> None:
    assert "Windows of 512 tokens that slide by 256, without BOS" in view_quality(report).how  # type: ignore[union-attr]
    report["text"]["bos"] = 1
    assert "each begun with BOS" in view_quality(report).how  # type: ignore[union-attr]


@pytest.mark.parametrize("left", ["float16", "stages"])
def test_without_scores_there_is_no_section(report: Report, left: str) -> None:
    if left == "stages":
        report["float16"] = None
    for stage in report["stages"]:
        stage["quality"] = None
    assert view_quality(report) is None
    assert 'id="quality"' not in render_html(report)
    assert "### Quality" not in render_markdown(report)


def test_what_is_not_finite_is_a_dash(report: Report) -> None:
    report["stages"][2]["quality"]["all"] |= dict.fromkeys(("perplexity", "perplexity_increase_pct", "mean_kl", "p99_kl", "perplexity_noise"))
    report["stages"][2]["quality"]["all"] |= {"perplexity_interval_pct": [None, None], "kl_interval": [None, None]}
    assert rows_of(report)["Increase over float32"][3].value == "–"
    assert "None" not in render_html(report)


def test_page_and_markdown_show_the_same_numbers(report: Report) -> None:
    text = re.sub("<[^>]+>", " ", render_html(report))
    for _, cells in view_quality(report).tables[2].rows:  # type: ignore[union-attr]
        for cell in cells:
            assert cell.value in text
            assert cell.value in render_markdown(report)


def test_the_worst_text_is_named_beside_the_gate_of_kl(report: Report) -> None:
    next(check for check in report["stages"][2]["checks"] if check["check"] == "mean_kl").update(
        {"value": 0.012, "passed": False, "where": "code.txt"}
    )
    (row,) = [line for line in render_markdown(report).splitlines() if "**int8**" in line and line.startswith("|")]
    assert "✗ code.txt 0.0120 ≤ 0.01" in row
