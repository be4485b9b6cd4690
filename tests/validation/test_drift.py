from __future__ import annotations

import math
from typing import Any

import pytest

from validation.drift import drift_words, name_first_layer
from validation.measurement import StageMeasurement


def measured_of(ratios: list[float], limit: float = 2.0, *, passed: bool | None = False) -> tuple[StageMeasurement, dict[str, Any]]:
    worst = max(range(len(ratios)), key=lambda layer: math.inf if math.isnan(ratios[layer]) else ratios[layer])
    measured = StageMeasurement(local_ratios=ratios)
    measured.numbers["worst_local_layer"] = worst
    check = {"check": "worst_local_ratio", "limit": limit, "passed": passed, "where": f"layer {worst}"}
    name_first_layer(measured, [{"check": "noise_ratio", "passed": False, "limit": 1.0}, check])
    return measured, check


@pytest.mark.parametrize(
    ("ratios", "first", "where"),
    [
        ([0.9, 3.0, 1.0, 17.0], 1, "layer 3; the first beyond is layer 1"),
        ([0.9, 1.9, 2.1], 2, "layer 2"),
        ([0.9, math.nan, 5.0], 1, "layer 1"),
    ],
)
def test_the_first_layer_beyond_the_limit_is_named(ratios: list[float], first: int, where: str) -> None:
    measured, check = measured_of(ratios)
    assert (measured.numbers["first_layer_outside"], check["where"]) == (first, where)


def test_layers_within_the_limit_name_none() -> None:
    measured, check = measured_of([0.9, 2.0], passed=True)
    assert (measured.numbers["first_layer_outside"], check["where"]) == (None, "layer 1")


def test_a_stage_without_a_limit_has_no_band() -> None:
    measured = StageMeasurement(local_ratios=[9.0, 30.0])
    name_first_layer(measured, [])
    assert measured.numbers["first_layer_outside"] is None


def test_a_headline_adds_the_layer_to_checks_that_do_not_say_it() -> None:
    assert drift_words({"first_layer_outside": 3}, {"check": "noise_ratio"}) == "; the first layer beyond its band is layer 3"
    assert drift_words({"first_layer_outside": 3}, {"check": "worst_local_ratio"}) == ""
    assert drift_words({}, {"check": "noise_ratio"}) == ""
