from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from artifact.steps import StepContext
from validation.render import render_html, render_json, render_junit, render_markdown, write_reports


def test_json_holds_the_report_with_the_verdict_on_top(report: dict[str, Any]) -> None:
    shuffled = dict(sorted(report.items(), reverse=True)) | {"extra": 1}
    text = render_json(shuffled)
    assert json.loads(text) == shuffled
    assert list(json.loads(text))[:7] == ["schema", "schema_id", "created", "artifact", "passed", "verdict", "headline"]
    assert list(json.loads(text))[-1] == "extra"
    assert text == render_json(report | {"extra": 1})


def test_json_is_ascii_for_any_string(report: dict[str, Any]) -> None:
    report["model"]["name"] = "🦙\ud800\x00"
    assert json.loads(render_json(report).encode("ascii"))["model"]["name"] == "🦙\ud800\x00"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_finite_and_says_where(report: dict[str, Any], value: float) -> None:
    report["stages"][1]["local_ratios"][4] = value
    with pytest.raises(ValueError, match=r"report\.stages\[1\]\.local_ratios\[4\] is -?(nan|inf)"):
        render_json(report)


def test_write_reports_writes_the_four_files_and_records_them(tmp_path: Path, report: dict[str, Any]) -> None:
    step = StepContext(tmp_path)
    write_reports(step, report)
    assert sorted(step.outputs) == [f"reports/parity.{suffix}" for suffix in ("html", "json", "md", "xml")]
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["parity.html", "parity.json", "parity.md", "parity.xml"]
    assert json.loads((tmp_path / "reports/parity.json").read_text(encoding="utf-8")) == report
    assert ET.parse(tmp_path / "reports/parity.xml").getroot().tag == "testsuites"
    for suffix, render in (("md", render_markdown), ("html", render_html), ("xml", render_junit)):
        assert (tmp_path / f"reports/parity.{suffix}").read_bytes() == render(report).encode()


def test_write_reports_writes_nothing_when_one_format_refuses(tmp_path: Path, report: dict[str, Any]) -> None:
    report["floor"]["mean_abs"] = math.nan
    with pytest.raises(ValueError, match=r"report\.floor\.mean_abs"):
        write_reports(StepContext(tmp_path), report)
    assert list(tmp_path.iterdir()) == []
