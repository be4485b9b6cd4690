"""Two reports compared: what is worse beyond its margin fails, what is better is named, what can't be compared is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import ValidationError
from commands.validate import ValidateOptions, validate
from validation.baseline import PLAN_MARGINS, STAGE_MARGINS, Margin, compare, require_comparable
from validation.baseline_file import read_baseline
from validation.parity import overall
from validation.render import render_html, render_junit, render_markdown
from validation.tolerances import Limit, judge

pytestmark = pytest.mark.parity
Report = dict[str, Any]


@pytest.fixture
def old(sound_report: Report) -> Report:
    """A real report, with a plan and two numbers of its text, which a model without a tokenizer has not."""
    report = copy.deepcopy(sound_report)
    numbers = {"mean_kl": 0.002, "perplexity_increase_pct": 0.3, "perplexity_se_pct": 0.05, "top1_agreement": 0.98, "decode_noise_ratio": 0.9}
    report["stages"][0] |= numbers
    check = {"check": "bytes_per_weight", "value": 2.0, "limit": 2.1, "comparison": "<=", "passed": True, "reason": "once", "where": None}
    plan = {"file": "engines/a/part-00.plan", "bytes": 100_000_000, "bytes_per_weight": 2.0, "audit": {"passed": True, "checks": [check]}}
    report["engines"] = [plan | {"precision": "fp16", "target": "a", "backend": "tensorrt-rtx"}]
    return report


@pytest.fixture
def now(old: Report) -> Report:
    return copy.deepcopy(old)


def outcomes(comparison: Report) -> dict[str, str]:
    return {change["metric"]: change["outcome"] for change in comparison["changes"]}


def test_a_report_is_no_worse_than_itself(now: Report, old: Report) -> None:
    comparison = compare(now, old)
    assert comparison["passed"] is True
    assert set(outcomes(comparison).values()) == {"same"}
    assert comparison["differs"] == comparison["not_compared"] == []
    assert comparison["words"] == f"no regression; {len(comparison['changes'])} numbers compared"


def test_scenarios_of_another_length_are_not_compared(now: Report, old: Report) -> None:
    run = old["stages"][0]["scenarios"][0]
    run["positions"] += 64
    with pytest.raises(ValidationError, match=rf"scenarios of other lengths .*: there {run['scenario']} {run['positions']} in "):
        compare(now, old)


def test_every_margin_is_tried_by_these_tests(old: Report) -> None:
    known = {change["metric"] for change in compare(old, old)["changes"]}
    assert known == {margin.key for margin in (*STAGE_MARGINS, *PLAN_MARGINS)}


@pytest.mark.parametrize("margin", STAGE_MARGINS + PLAN_MARGINS, ids=lambda margin: margin.key)
@pytest.mark.parametrize(("factor", "outcome"), [(1.01, "regressed"), (0.99, "same"), (-0.99, "same"), (-1.01, "improved")])
def test_a_number_is_judged_at_its_margin(now: Report, old: Report, margin: Margin, factor: float, outcome: str) -> None:
    part = "engines" if margin in PLAN_MARGINS else "stages"
    allowed = next(change["allowed"] for change in compare(old, old)["changes"] if change["metric"] == margin.key)
    now[part][0][margin.key] += factor * allowed * (-1 if margin.higher_is_better else 1)
    comparison = compare(now, old)
    assert outcomes(comparison)[margin.key] == outcome
    assert comparison["passed"] is (outcome != "regressed")
    assert ("better" in comparison["words"]) is (outcome == "improved")


def test_the_interval_of_the_text_excuses_nothing_on_the_same_text(now: Report, old: Report) -> None:
    wide = {"kl_interval": [0.001, 0.003], "perplexity_se_pct": 0.5, "top1_interval": [0.9, 1.0]}
    for report in (now, old):
        report["stages"][0] |= {"quality": {"all": wide}, "perplexity_se_pct": 0.5}
    now["stages"][0] |= {"mean_kl": 0.00221, "perplexity_increase_pct": 0.41, "top1_agreement": 0.974}
    found = outcomes(compare(now, old))
    assert [found[key] for key in ("mean_kl", "perplexity_increase_pct", "top1_agreement")] == ["regressed"] * 3


@pytest.mark.parametrize(("passed", "words"), [(False, "noise_ratio fails now"), (None, "noise_ratio is not judged now")])
def test_a_gate_that_passed_and_does_not_any_more_is_a_regression(now: Report, old: Report, passed: bool | None, words: str) -> None:
    next(check for check in now["stages"][0]["checks"] if check["check"] == "noise_ratio")["passed"] = passed
    comparison = compare(now, old)
    (lost,) = [check for check in comparison["checks"] if check["passed"] is False]
    assert (lost["check"], lost["value"], lost["where"]) == ("gates_lost", 1, "traced")
    assert words in lost["reason"]
    assert compare(old, now)["passed"] is True  # what failed there and passes here is no loss


def test_an_audit_that_passed_is_a_gate_too(now: Report, old: Report) -> None:
    now["engines"][0]["audit"]["checks"][0]["passed"] = False
    assert compare(now, old)["words"].startswith("1 regression: audit of engines/a/part-00.plan gates_lost")


def test_a_stage_that_is_gone_is_a_regression_and_one_that_was_not_run_is_named(now: Report, old: Report) -> None:
    old["stages"].append(old["stages"][0] | {"stage": "int8"})
    assert "int8 gates_lost" in compare(now, old)["words"]
    now["not_run"] = [{"stage": "int8", "reason": "not asked for"}]
    comparison = compare(now, old)
    assert comparison["passed"] is True
    assert comparison["not_compared"] == now["not_run"]
    assert comparison["words"].endswith("1 stages not run now")


@pytest.mark.parametrize("gone", [None, math.nan, math.inf])
@pytest.mark.parametrize("margin", STAGE_MARGINS + PLAN_MARGINS, ids=lambda margin: margin.key)
def test_a_number_that_is_gone_is_a_regression(now: Report, old: Report, margin: Margin, gone: float | None) -> None:
    now["engines" if margin in PLAN_MARGINS else "stages"][0][margin.key] = gone
    comparison = compare(now, old)
    assert outcomes(comparison)[margin.key] == "regressed"
    assert f" {margin.key}; " in comparison["words"]
    (check,) = [check for check in comparison["checks"] if check["check"] == margin.key]
    assert (check["passed"], check["value"]) == (False, None)
    assert check["reason"].startswith("not judged: not measured; the baseline has ")


@pytest.mark.parametrize(
    ("missing", "outcome", "words"),
    [
        ("there is no floor", "not measured", "no regression; {} numbers compared, 1 not measured now"),
        (None, "regressed", "1 regression: traced decode_noise_ratio; {} numbers compared"),
    ],
)
def test_a_number_that_is_gone_for_a_reason_is_counted(now: Report, old: Report, missing: str | None, outcome: str, words: str) -> None:
    row = Limit("plan", "decode_noise_ratio", "<=", 1.0, "of a plan")
    now["stages"][0]["decode_noise_ratio"] = None
    now["stages"][0]["checks"].append(judge(row, None, missing=missing))
    comparison = compare(now, old)
    assert outcomes(comparison)["decode_noise_ratio"] == outcome
    assert comparison["words"] == words.format(len(comparison["changes"]) - (missing is not None))
    (change,) = [change for change in comparison["changes"] if change["metric"] == "decode_noise_ratio"]
    assert change["reason"] == f"not judged: {missing or 'not measured'}"
    now["baseline"] = {"file": "old.json", "sha256": "0", "created": "2026-01-01", **comparison}
    now["stages"][0]["quality"] = None
    assert f"{outcome}: {change['reason']}" in render_markdown(now)


def test_versions_limits_and_new_stages_are_named(now: Report, old: Report) -> None:
    now["versions"]["torch"] = "9.9"
    now["tolerances"][0]["limit"] = 77.0
    now["stages"].append(now["stages"][0] | {"stage": "fused"})
    assert {item["what"]: item["now"] for item in compare(now, old)["differs"]} == {
        "versions: torch": "9.9", f"limit of {old['tolerances'][0]['check']}, traced": 77.0, "stage fused": "new",
    }  # fmt: skip


def test_limits_that_differ_are_named_in_one_order(now: Report, old: Report) -> None:
    for row in now["tolerances"]:
        row["limit"] = 77.0
    named = [item["what"] for item in compare(now, old)["differs"]]
    assert len(named) == len(now["tolerances"]) > 5
    assert named == [f"limit of {check}, {stage}" for stage, check in sorted((row["stage"], row["check"]) for row in now["tolerances"])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: report["model"].update(fingerprint="other"), "another checkpoint: there other, here "),
        (lambda report: report["model"].update(dtype="fp32"), "another dtype: there fp32, here fp16"),
        (lambda report: report["cache"].update(form="static"), "another KV cache: there static, here dynamic"),
        (lambda report: report["texts"][0].update(sha256="0" * 64), "other texts: there "),
        (lambda report: report["texts"][0].update(scored_tokens=1), "other texts: there "),
        (lambda report: report.update(stages=[]), "no stage in common: there none, here traced"),
    ],
)
def test_a_report_of_something_else_is_refused(now: Report, old: Report, change: Callable[[Report], Any], words: str) -> None:
    change(old)
    with pytest.raises(ValidationError, match=f"can't be compared: {words}"):
        compare(now, old)


def test_what_is_not_known_yet_is_not_asked(old: Report) -> None:
    require_comparable({"model": {"fingerprint": old["model"]["fingerprint"]}}, old)
    with pytest.raises(ValidationError, match="another checkpoint"):
        require_comparable({"model": {"fingerprint": "other"}}, old)


def test_a_regression_shows_in_every_format(now: Report, old: Report) -> None:
    now["stages"][0]["mean_kl"] = 0.02
    now["baseline"] = {"file": "old.json", "sha256": "0", "created": "2026-01-01", **compare(now, old)}
    now["stages"][0]["quality"] = None
    assert overall(now) is False
    assert overall(now | {"baseline": None}) is True
    markdown, page, junit = render_markdown(now), render_html(now), render_junit(now)
    assert "### Against the baseline" in markdown
    assert "1 regression: traced mean_kl" in markdown
    assert "| ✗ traced | mean kl | 0.00200 | 0.0200 | ≤ " in markdown
    assert "Against the baseline" in page
    assert 'classname="parity.baseline"' in junit
    assert 'name="mean_kl [traced]"' in junit


def test_a_baseline_is_read_whole(tmp_path: Path, old: Report) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    baseline = read_baseline(path)
    assert (baseline.file, baseline.report) == ("old.json", old)
    assert baseline.judge(old)["passed"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ("[]", "is not a parity report: it has no schema number"),
        ('{"schema": 1}', "has schema 1, older than this version's 2"),
        ('{"schema": 3}', "has schema 3, newer than this version's 2"),
        ('{"schema": 2, "created": ""}', "is not a whole report: it lacks model, texts"),
    ],
)
def test_what_is_no_report_of_this_schema_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValidationError, match=words) as caught:
        read_baseline(path)
    assert caught.value.hint


def test_validate_of_an_artifact_holds_it_against_its_baseline(artifact: Path, sound_report: Report, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(sound_report))
    report = validate(artifact, ValidateOptions(baseline=old)).report
    assert (report["passed"], report["baseline"]["passed"]) == (True, True)
    assert report["baseline"]["words"].startswith("no regression; ")
    old.write_text(json.dumps(sound_report | {"model": sound_report["model"] | {"fingerprint": "other"}}))
    with pytest.raises(ValidationError, match="another checkpoint"):
        validate(artifact, ValidateOptions(baseline=old))


def test_another_run_of_the_ranges_is_named(now: Report, old: Report) -> None:
    old["stages"][0]["range_run"], now["stages"][0]["range_run"] = "float32", "strict"
    what = f"run of range_peak, {now['stages'][0]['stage']}"
    assert {"what": what, "baseline": "float32", "now": "strict"} in compare(now, old)["differs"]
