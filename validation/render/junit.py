"""The report as JUnit XML: one test suite a stage, one test case a check, so that a CI names the gate that broke."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from validation.render.gates import Check, Group, Report, groups
from validation.render.wording import cache_form, clean, label, limit, metric

COUNTED = ("tests", "failures", "errors", "skipped")


def render_junit(report: Report) -> str:
    """JUnit XML. A failed check is a failure, an unjudged check and a stage that did not run are skipped.

    CI is never greener than the verdict: a report that failed although all of its groups passed gets a suite of its own that fails, one that was not
    judged a suite of its own that is skipped.
    """
    suites = [_suite(group, report) for group in groups(report)]
    suites += [_not_run(entry) for entry in report.get("not_run") or ()]
    passed = report.get("passed")
    if passed is None or (passed is False and not any(int(suite.get("failures", 0)) for suite in suites)):
        suites.append(_suite(Group("report", passed, (_verdict(report),)), report))
    root = ET.Element("testsuites", name="parity", time=f"{report.get('seconds') or 0:.3f}")
    root.extend(suites)
    for key in COUNTED:
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in suites)))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(('<?xml version="1.0" encoding="utf-8"?>\n', "\n"))


def _suite(group: Group, report: Report) -> ET.Element:
    cases = [_case(group.name, check) for check in group.checks]
    _tell_apart(cases)
    suite = _with_counts(group.name, cases)
    suite.set("time", f"{group.seconds or 0:.3f}")
    suite.set("timestamp", _timestamp(report))
    properties = ET.Element("properties")
    ET.SubElement(properties, "property", name="kv_cache", value=cache_form(report))
    suite.insert(0, properties)
    return suite


def _tell_apart(cases: Sequence[ET.Element]) -> None:
    """Number cases of one name: a CI would fold them into one."""
    seen: Counter[str] = Counter()
    for case in cases:
        name = case.get("name", "")
        seen[name] += 1
        if seen[name] > 1:
            case.set("name", f"{name} #{seen[name]}")


def _with_counts(name: str, cases: Sequence[ET.Element]) -> ET.Element:
    failures = sum(case.find("failure") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    suite = ET.Element("testsuite", name=clean(name), tests=str(len(cases)), failures=str(failures), errors="0", skipped=str(skipped))
    suite.extend(cases)
    return suite


def _case(group: str, check: Check) -> ET.Element:
    name = check["check"] if not check.get("where") else f"{check['check']} [{check['where']}]"
    case = ET.Element("testcase", name=clean(name), classname=clean(f"parity.{group}"))
    if check["passed"] is False:
        failure = ET.SubElement(case, "failure", message=_sentence(check), type="ParityMismatch")
        failure.text = "\n".join(filter(None, (_sentence(check), clean(check.get("reason") or ""))))
    elif check["passed"] is None:
        ET.SubElement(case, "skipped", message=clean(check.get("reason") or "shown, not judged"))
    return case


def _sentence(check: Check) -> str:
    """``noise ratio is 1.31, must be ≤ 1, in layer 15``."""
    name = check["check"]
    where = f", in {clean(check['where'])}" if check.get("where") else ""
    return f"{label(name)} is {metric(name, check.get('value'), against=check.get('limit'))}, must be {limit(name, check)}{where}"


def _not_run(entry: Report) -> ET.Element:
    case = ET.Element("testcase", name="run", classname=clean(f"parity.{entry['stage']}"))
    ET.SubElement(case, "skipped", message=clean(f"not run: {entry['reason']}"))
    suite = _with_counts(entry["stage"], [case])
    suite.set("time", "0.000")
    return suite


def _timestamp(report: Report) -> str:
    """UTC without an offset: the format's readers know none."""
    return re.sub(r"(\+00:00|Z)$", "", clean(report.get("created") or ""))


def _verdict(report: Report) -> Check:
    """The whole report's own case, failed or skipped."""
    case = {"check": "verdict", "limit": "passed", "comparison": "==", "passed": report.get("passed"), "where": None}
    if case["passed"] is None:
        return case | {"value": None, "reason": f"not judged: {report.get('headline') or report.get('verdict')}"}
    return case | {"value": "failed", "reason": report.get("headline")}
