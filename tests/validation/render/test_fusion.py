"""The fusion of the report, on the page and in Markdown: every rule with its count, the first refusal, operators by layer, what TensorRT it needs."""

from __future__ import annotations

from html import unescape
from typing import Any

import pytest

from validation.render import render_html, render_markdown
from validation.render.fusion import view_fusion


def test_a_rule_shows_what_fired_what_was_expected_and_the_first_refusal(report: Any) -> None:
    view = view_fusion(report)
    assert view is not None
    reason = "model.layers.1.self_attn.Softmax: the softmax is not over the last axis, the keys"
    assert view.rules == [(True, ("rms_norm", "61", "61", "0", "–")), (False, ("attention", "29", "30", "1", reason))]
    assert view.summary == "2,348 → 1,040 nodes; needs TensorRT ≥ 10.15 because of RMSNormalization"


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_both_renderings_say_all_of_it(report: Any, render: Any) -> None:
    text = unescape(render(report))
    for words in ("Fusion", "rms_norm", "the softmax is not over the last axis", "layers 0–29 (30 alike): RMSNormalization 2, MatMul 4"):
        assert words in text
    assert "needs TensorRT ≥ 10.15 because of RMSNormalization" in text


def test_a_long_line_of_operators_is_shown_whole(report: Any) -> None:
    line = "layer 0: " + ", ".join(f"Operator{index} {index}" for index in range(40))
    report["fusion"]["layer_operators"]["lines"] = [line]
    for render in (render_html, render_markdown):
        assert line in unescape(render(report))


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_an_artifact_that_was_not_fused_has_no_such_section(report: Any, render: Any) -> None:
    text = render(report | {"fusion": None})
    assert "Fusion" not in text
    assert "Operators by layer" not in text


def test_a_rule_that_was_not_tried_says_why(report: Any) -> None:
    report["fusion"]["rules"][0] |= {"note": "not tried: the weights lie elsewhere"}
    view = view_fusion(report)
    assert view is not None
    assert view.rules[0][1][-1] == "not tried: the weights lie elsewhere"
