from __future__ import annotations

from typing import get_args

import pytest

from graphs.quantize.placement import GATE, gate_of, nats_of
from validation.limit_rows import table
from validation.measurement import NUMBERS
from validation.tolerances import (
    COMPARE,
    LIMITS,
    NO_FLOOR,
    STATIC,
    Kind,
    Limit,
    entry_kind,
    gated_value,
    judge,
    kind_of,
    limits_of,
    too_few_tokens,
    verdict,
)

ROW = Limit("float16", "noise_ratio", "<=", 1.0, "because")


def test_every_limit_has_a_reason_and_is_measured() -> None:
    measured = {*NUMBERS, "engine_difference", "engine_noise_ratio", "engine_structure", "reference_kl", "hidden_error"}
    for row in (*LIMITS, *NO_FLOOR, *STATIC):
        assert row.reason
        assert row.check in measured
        assert row.kind in get_args(Kind)
        assert row.comparison in COMPARE


def test_no_check_has_two_limits() -> None:
    keys = [(row.kind, row.check) for row in (*LIMITS, *NO_FLOOR, *STATIC)]
    assert len(keys) == len(set(keys))


def test_limits_are_those_of_the_design() -> None:
    limits = {(row.kind, row.check): row.limit for row in LIMITS}
    assert limits["float32", "max_abs_relative"] == 1e-4
    assert limits["float16", "noise_ratio"] == 1.0
    assert limits["float16", "part_noise_ratio"] == 2.0
    assert limits["float16", "self_consistency"] == limits["int8", "self_consistency"] == 2.0
    assert limits["float16", "strict_noise_ratio"] == 1.25
    assert limits["float16", "worst_local_ratio"] == 2.0
    assert limits["float16", "decisive_disagreements"] == 0
    assert limits["int8", "perplexity_increase_pct"] == limits["int8-smoothquant", "perplexity_increase_pct"] == 1.0
    assert limits["int8", "mean_kl"] == 0.01


def test_static_caches_are_judged_where_there_are_any() -> None:
    for kind in ("float32", "float16", "int8", "engine"):
        static = [row.check for row in limits_of(kind, kv_cache="static")]
        assert static == [*(row.check for row in limits_of(kind)), "stray_slots"]


@pytest.mark.parametrize(("value", "passed"), [(0.9, True), (1.0, True), (1.0001, False), (float("nan"), False), (float("inf"), False), (None, None)])
def test_judge_holds_a_value_against_its_limit(value: float | None, passed: bool | None) -> None:
    assert judge(ROW, value)["passed"] is passed


def test_judge_says_why_there_is_no_verdict() -> None:
    check = judge(ROW, None, missing="no floor")
    assert check["value"] is None
    assert check["reason"] == "not judged: no floor"


def test_judge_never_puts_nan_into_the_report_and_says_so() -> None:
    check = judge(ROW, float("nan"), where="layer 3")
    assert check["value"] is None
    assert check["where"] == "layer 3"
    assert check["reason"] == "the value is not finite; because"


def test_range_peak_fails_at_the_whole_range() -> None:
    row = next(row for row in LIMITS if row.check == "range_peak")
    assert judge(row, 0.999)["passed"] is True
    assert judge(row, 1.0)["passed"] is False


@pytest.mark.parametrize(
    ("outcomes", "expected"), [([True, None], True), ([True, False, None], False), ([None, None], None), ([], None), ([True], True)]
)
def test_verdict_needs_one_pass_and_no_failure(outcomes: list[bool | None], expected: bool | None) -> None:
    assert verdict([{"passed": outcome} for outcome in outcomes]) is expected


def test_verdict_of_int8_by_int8_needs_a_text_that_was_judged() -> None:
    """Its other checks would hold for a graph with other weights too."""
    structure = {"check": "range_peak", "passed": True}
    unjudged, judged, failed = ([structure, {"check": "mean_kl", "passed": outcome}] for outcome in (None, True, False))
    assert [verdict(checks, "int8-smoothquant") for checks in (unjudged, judged, failed)] == [None, True, False]
    assert verdict(unjudged, "plan-int8-smoothquant") is None
    assert verdict(unjudged, "int8") is True


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("int8-smoothquant-engine", "engine"), ("int8-engine", "engine"), ("fused-engine", "engine"), ("int4-engine", "int4"), ("traced", "float16")],
)
def test_an_engine_graph_is_judged_as_one_unless_its_weights_have_no_limit(stage: str, kind: str) -> None:
    """Equal to its stage is the proof; a text is its stage's to hold."""
    assert entry_kind(stage, "fp16") == kind
    equal = [{"check": "engine_difference", "passed": True}]
    assert verdict(equal, entry_kind(stage, "fp16")) is (None if kind == "int4" else True)


def test_one_limit_on_divergence_for_placement_and_its_graph() -> None:
    for kind in ("int8-smoothquant", "plan-int8-smoothquant"):
        gates = {row.check: row.limit for row in limits_of(kind)}  # type: ignore[arg-type]
        assert gates["mean_kl"] == gate_of(gates["perplexity_increase_pct"]) == GATE * nats_of(1.0)


def test_verdict_never_says_that_int4_passed() -> None:
    checks = {outcome: [{"passed": None}, {"passed": outcome}] for outcome in (True, False, None)}
    assert [verdict(checks[outcome], "int4") for outcome in (True, False, None)] == [None, False, None]
    assert verdict(checks[True], "int8") is True


@pytest.mark.parametrize(
    ("stage", "dtype", "kind"),
    [
        ("traced", "fp16", "float16"),
        ("fused", "fp32", "float32"),
        ("int8", "fp16", "int8"),
        ("fused-engine", "fp16", "engine"),
        ("traced-engine", "fp32", "engine"),
        ("something", "fp16", None),
        ("something-engine", "fp16", None),
    ],
)
def test_kind_of_a_stage(stage: str, dtype: str, kind: str | None) -> None:
    assert kind_of(stage, dtype) == kind  # type: ignore[arg-type]


def test_kl_gates_a_float16_stage_that_has_no_floor() -> None:
    assert "mean_kl" not in {row.check for row in limits_of("float16")}
    assert "mean_kl" in {row.check for row in limits_of("float16", has_floor=False)}
    assert {row["check"] for row in table(["fused"], "fp16", has_floor=False)} > {"mean_kl", "noise_ratio"}


@pytest.mark.parametrize(("increase", "scored", "value"), [(1.5, 2048, 1.1), (1.5, 2047, None), (float("inf"), 2047, float("inf")), (None, 0, None)])
def test_perplexity_is_judged_on_enough_tokens_only(increase: float | None, scored: int, value: float | None) -> None:
    numbers = {"perplexity_increase_pct": increase, "perplexity_se_pct": 0.2, "tokens": scored, "text": "only.txt"}
    found, text = gated_value("perplexity_increase_pct", numbers, [numbers])
    assert found == (value if value is None else pytest.approx(value))
    assert text is None  # of one text there is no worst


def text_of(name: str, increase: float, kl: float, tokens: int = 1024) -> dict[str, float | int | str]:
    return {"text": name, "perplexity_increase_pct": increase, "perplexity_se_pct": 0.1, "mean_kl": kl, "tokens": tokens}


def test_the_worst_text_is_gated_and_named() -> None:
    texts = [text_of("a", 2.0, 0.001), text_of("b", -1.0, 0.02)]
    assert gated_value("perplexity_increase_pct", text_of("", 0.5, 0.01), texts) == (1.8, "a")
    assert gated_value("mean_kl", text_of("", 0.5, 0.01), texts) == (0.02, "b")
    assert gated_value("noise_ratio", {"noise_ratio": 0.5}, texts) == (0.5, None)
    assert gated_value("mean_kl", {"mean_kl": None}, texts) == (None, None)  # a plan that is too small for the text


def test_a_text_of_few_tokens_is_not_judged_by_perplexity() -> None:
    texts = [text_of("a", 0.1, 0.001, 2048), text_of("b", 5.0, 0.001, 511)]
    assert gated_value("perplexity_increase_pct", text_of("", 0.5, 0.01), texts) == (None, None)
    assert too_few_tokens([2048, 511]) == "too few tokens of a text for the gate (511 of 512)"
    assert too_few_tokens([1024, 1024]) is None
