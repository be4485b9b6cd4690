from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from validation.render import render_junit


def suites(report: dict[str, Any]) -> dict[str, ET.Element]:
    return {suite.get("name", ""): suite for suite in ET.fromstring(render_junit(report))}


def test_junit_has_a_suite_a_stage_and_a_case_a_check(report: dict[str, Any]) -> None:
    found = suites(report)
    for stage in report["stages"]:
        assert len(found[stage["stage"]].findall("testcase")) == len(stage["checks"])
    assert found["fused"].get("time") == "41.700"
    assert {case.get("classname") for case in found["fused"].iter("testcase")} == {"parity.fused"}
    assert [(each.get("name"), each.get("value")) for each in found["fused"].iter("property")] == [("kv_cache", "dynamic cache")]


def test_junit_counts_are_those_of_its_cases(build_report: Any) -> None:
    report = build_report(broken_layer=15)
    report["stages"][0]["checks"][0]["passed"] = None
    root = ET.fromstring(render_junit(report))
    for element in (root, *root):
        cases = list(element.iter("testcase"))
        outcomes = [sum(case.find(kind) is not None for case in cases) for kind in ("failure", "skipped", "error")]
        assert [int(element.get(key, "-1")) for key in ("tests", "failures", "skipped", "errors")] == [len(cases), *outcomes]
    assert (root.get("failures"), root.get("skipped")) == ("1", "3")


def test_junit_failure_says_value_limit_and_layer(build_report: Any) -> None:
    (failure,) = suites(build_report(broken_layer=15))["fused"].iter("failure")
    assert failure.get("message") == "worst local ratio is 15.2, must be ≤ 2, in layer 15"
    assert "twice what rounding it adds" in (failure.text or "")


def test_junit_skips_what_did_not_run_with_its_reason(report: dict[str, Any]) -> None:
    suite = suites(report)["engine a100-80gb-fp16"]
    assert (suite.get("tests"), suite.get("skipped"), suite.get("failures")) == ("1", "1", "0")
    skipped = next(suite.iter("skipped"))
    assert skipped.get("message") == "not run: no GPU: a plan for sm80 can't run on this machine"


def test_junit_is_never_greener_than_the_verdict(report: dict[str, Any]) -> None:
    report["passed"] = False
    suite = suites(report)["report"]
    assert suite.get("failures") == "1"
    report["stages"][0]["passed"] = False
    assert "report" not in suites(report)
    assert suites(report)["traced"].get("failures") == "1"


@pytest.mark.parametrize("name", ["]]>", "<a>&", "\"'", "a\x00b\x08\ufffe\ud800", "🦙", "x" * 5000])
def test_junit_parses_back_whatever_the_names(report: dict[str, Any], name: str) -> None:
    report["stages"][0]["stage"] = report["not_run"][0]["reason"] = report["stages"][0]["checks"][0]["reason"] = name
    report["stages"][0]["checks"][0] |= {"passed": False, "where": name}
    expected = name.translate(dict.fromkeys([0, 8, 0xFFFE, 0xD800]))
    suite = suites(report)[expected]
    assert next(suite.iter("failure")).text == expected


def test_junit_of_no_stages_is_well_formed(build_report: Any) -> None:
    root = ET.fromstring(render_junit(build_report(stages=0) | {"engines": [], "not_run": [], "checksums": None}))
    assert (root.get("tests"), list(root)) == ("0", [])
