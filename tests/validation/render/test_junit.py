from __future__ import annotations

import re
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


def test_junit_says_that_nothing_was_judged(report: dict[str, Any]) -> None:
    assert "report" not in suites(report)
    report |= {"passed": None, "headline": "shown, no limit"}
    suite = suites(report)["report"]
    assert (suite.get("tests"), suite.get("skipped"), suite.get("failures")) == ("1", "1", "0")
    assert [case.get("name") for case in suite.iter("testcase")] == ["verdict"]
    assert next(suite.iter("skipped")).get("message") == "not judged: shown, no limit"


@pytest.mark.parametrize("name", ["]]>", "<a>&", "\"'", "a\x00b\x08\ufffe\ud800", "🦙", "x" * 5000])
def test_junit_parses_back_whatever_the_names(report: dict[str, Any], name: str) -> None:
    report["stages"][0]["stage"] = report["not_run"][0]["reason"] = report["stages"][0]["checks"][0]["reason"] = name
    report["stages"][0]["checks"][0] |= {"passed": False, "where": name}
    expected = name.translate(dict.fromkeys([0, 8, 0xFFFE, 0xD800]))
    suite = suites(report)[expected]
    assert (next(suite.iter("failure")).text or "").endswith(f"\n{expected}")


def test_junit_of_no_stages_is_well_formed(build_report: Any) -> None:
    root = ET.fromstring(render_junit(build_report(stages=0) | {"engines": [], "not_run": [], "checksums": None, "floor": None}))
    assert (root.get("tests"), list(root)) == ("0", [])


SUITE_CHILDREN = ("properties", "testcase", "system-out", "system-err")
ATTRIBUTES = {
    "testsuites": {"name", "time", "tests", "failures", "errors", "skipped", "disabled"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "disabled", "time", "timestamp", "hostname", "id", "package"},
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "classname", "time", "assertions", "status"},
    "failure": {"message", "type"},
    "skipped": {"message"},
}
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": set(SUITE_CHILDREN),
    "properties": {"property"},
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
}
REQUIRED = {"testsuite": {"name", "tests"}, "testcase": {"name"}, "property": {"name", "value"}}


@pytest.mark.parametrize("broken", [None, 15])
def test_junit_keeps_to_the_common_schema(build_report: Any, broken: int | None) -> None:
    """What Jenkins' junit-10.xsd allows, with `skipped` on the root, which pytest writes too; the order of a suite's children counts."""
    root = ET.fromstring(render_junit(build_report(broken_layer=broken)))
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.keys()) <= ATTRIBUTES[element.tag], element.tag
        assert set(element.keys()) >= REQUIRED.get(element.tag, set())
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set())
        for key in {"tests", "failures", "errors", "skipped"} & set(element.keys()):
            assert (element.get(key) or "").isdigit()
        if element.get("time") is not None:
            assert float(element.get("time") or "") >= 0
    for suite in root:
        order = [SUITE_CHILDREN.index(child.tag) for child in suite]
        assert order == sorted(order)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp") or "2026-03-04T10:11:12")


def test_junit_names_every_case_once(report: dict[str, Any]) -> None:
    """A CI folds cases of one name into one, and a failure could hide there."""
    cases = [(case.get("classname"), case.get("name")) for case in ET.fromstring(render_junit(report)).iter("testcase")]
    assert len(cases) == len(set(cases))


def test_junit_tells_cases_of_one_name_apart(report: dict[str, Any]) -> None:
    checks = report["stages"][0]["checks"]
    checks += [dict(checks[0]), dict(checks[0])]
    names = [case.get("name") for case in suites(report)[report["stages"][0]["stage"]].iter("testcase")]
    first = names[0]
    assert names[-2:] == [f"{first} #2", f"{first} #3"]
