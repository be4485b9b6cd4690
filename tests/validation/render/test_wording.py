from __future__ import annotations

import math
from typing import Any

import pytest

from validation.render import wording


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"), (math.nan, "–"), (math.inf, "–"), (0, "0"), (0.0, "0"), (0.41, "0.410"), (0.004567, "0.00457"), (15.243, "15.2"),
        (999.96, "1,000"),
        (24265.2, "24,265"), (1.2e-7, "1.20e-7"), (-0.0034, "-0.00340"), (2048, "2,048"), (12345678, "12,345,678"),
        (3.4e38, "3.40e38"), ("text", "text"),
    ],
)  # fmt: skip
def test_number_has_three_significant_digits(value: Any, expected: str) -> None:
    assert wording.number(value) == expected


@pytest.mark.parametrize(
    ("value", "against", "expected"),
    [
        (1.0004, 1.0, "1.0004"),
        (0.99996, 1.0, "0.99996"),
        (1.0, 1.0, "1.00"),
        (0.41, 1.0, "0.410"),
        (1.0004, None, "1.00"),
        (0.0100002, 0.01, "0.0100002"),
    ],
)
def test_number_shows_on_which_side_of_its_limit_it_lies(value: float, against: float | None, expected: str) -> None:
    assert wording.number(value, against=against) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("noise_ratio", 0.805, "0.805"), ("range_peak", 0.3704, "37.0 %"), ("top1_agreement", 1.0, "100 %"), ("top1_agreement", 0.99996, "99.996 %"),
        ("perplexity_increase_pct", 0.31, "+0.310 %"), ("perplexity_increase_pct", -0.31, "−0.310 %"), ("range_peak", None, "–"),
    ],
)  # fmt: skip
def test_metric_is_shown_in_its_unit(name: str, value: float | None, expected: str) -> None:
    assert wording.metric(name, value).replace(wording.SPACE, " ") == expected


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ({"check": "noise_ratio", "limit": 1.0, "comparison": "<="}, "≤ 1"), ({"check": "mean_kl", "limit": 0.01, "comparison": "<="}, "≤ 0.01"),
        ({"check": "max_abs_relative", "limit": 1e-4, "comparison": "<="}, "≤ 0.0001"), ({"check": "x", "limit": 1e-6}, "≤ 1e-6"),
        ({"check": "range_peak", "limit": 1.0, "comparison": "<="}, "≤ 100 %"), ({"check": "kernels", "limit": 60, "comparison": "=="}, "= 60"),
        ({"check": "x", "limit": None}, "no limit"), ({"check": "rows", "limit": 4096, "comparison": ">="}, "≥ 4,096"),
    ],
)  # fmt: skip
def test_limit_carries_no_idle_zeros(check: dict[str, Any], expected: str) -> None:
    assert wording.limit(check["check"], check).replace(wording.SPACE, " ") == expected


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.2912, 0.0406, "+0.291 ± 0.041 %"),
        (-0.00679, 0.006, "−0.0068 ± 0.0060 %"),
        (12.3, 1.9, "+12.3 ± 1.9 %"),
        (0.5, None, "+0.500 %"),
        (None, None, "–"),
    ],
)
def test_plus_minus_rounds_value_and_error_to_one_place(value: float | None, error: float | None, expected: str) -> None:
    assert wording.plus_minus(value, error).replace(wording.SPACE, " ") == expected


def test_sizes_durations_and_counts_are_said_as_people_say_them() -> None:
    said = [
        wording.size(283_115_520),
        wording.size(512),
        wording.duration(214.6),
        wording.duration(0.42),
        wording.count(134_515_008),
        wording.size(None),
    ]
    assert [text.replace(wording.SPACE, " ") for text in said] == ["283 MB", "512 B", "3 min 35 s", "0.420 s", "135 M", "–"]


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({"form": "static", "capacity": 1328}, "static cache of 1,328 slots"),
        ({"form": "dynamic", "capacity": None}, "dynamic cache"),
        (None, "–"),
    ],
)
def test_cache_form_is_said_with_its_slots(cache: dict[str, Any] | None, expected: str) -> None:
    assert wording.cache_form({"cache": cache}) == expected


def test_clean_takes_out_what_no_format_can_carry() -> None:
    assert wording.clean("a\x00b\x1b[31m\ud800\u202ec\n🦙👩‍💻") == "ab[31mc\n🦙👩‍💻"


def test_shorten_keeps_both_ends_of_one_line() -> None:
    text = wording.shorten("start\n" + "x" * 500 + " end", limit=21)
    assert text == "start xxxx…xxxxxx end"
    assert wording.shorten("a\tb\n c") == "a b c"


def test_breakable_escapes_and_allows_breaks() -> None:
    assert wording.breakable("a.b_<i>") == "a.<wbr>b_<wbr>&lt;i&gt;"


def test_unbroken_keeps_a_number_with_what_stands_before_it() -> None:
    assert wording.unbroken("to stage 0.0004 ≤ 0.00195") == "to stage\N{NO-BREAK SPACE}0.0004 ≤\N{NO-BREAK SPACE}0.00195"
