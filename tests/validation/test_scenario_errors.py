from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import pytest

from validation.floor import Floor, no_floor
from validation.row_result import RowResult
from validation.scenario_errors import Alone, compare_scenario, ratio
from validation.scenarios import Scenario

SCENARIO = Scenario("padded", (np.arange(6), np.arange(4)), (0, 1), (4, 1, 1))
FLOOR = Floor(1.0, 1.0, [[1.0] * 6, [1.0, 1.0, 2.0, 2.0]], [[1.0] * 6, [1.0] * 4], "by hand")


@dataclass
class Reference:
    """Zeros everywhere, so that a logit is its own error."""

    floor: Floor = FLOOR
    logits: list[Any] = field(default_factory=lambda: [np.zeros((6, 3), np.float32), np.zeros((4, 3), np.float32)])
    runs: list[Any] = field(default_factory=lambda: [Cache(6), Cache(4)])


class Cache:
    """One layer of zeros."""

    def __init__(self, length: int) -> None:
        self.keys = self.values = [np.zeros((1, length, 2), np.float32)]


def row(*errors: float) -> RowResult:
    cache = [np.zeros((1, len(errors), 2), np.float32)]
    return RowResult(np.arange(len(errors)), np.repeat(np.array(errors, np.float32)[:, None], 3, axis=1), cache, cache)


def parts_of(first: RowResult, second: RowResult, floor: Floor = FLOOR) -> dict[str, dict[str, Any]]:
    own = [Alone(np.zeros((length, 3), np.float32), np.full(length, 0.5)) for length in (6, 4)]
    entry = compare_scenario(Reference(floor), SCENARIO, [first, second], own)  # type: ignore[arg-type]
    return {part["where"]: part for part in entry["parts"]}


def test_each_part_is_measured_at_its_own_positions() -> None:
    parts = parts_of(row(1, 1, 1, 1, 1, 1), row(1, 1, 8, 8))
    assert {where: part["mean_abs"] for where, part in parts.items()} == {
        "padded, row 0, prompt": 1.0,
        "padded, row 0, steps": 1.0,
        "padded, row 1, prompt": 1.0,
        "padded, row 1, steps": 8.0,
    }
    steps = parts["padded, row 1, steps"]
    assert steps["positions"] == 2
    assert steps["noise_ratio"] == 4.0  # the floor is 2 there
    assert steps["self_consistency"] == 4.0
    assert steps["spread"] == 4.0  # its own error is below the floor, and counts as the floor


def test_what_is_not_finite_stays_in_its_part() -> None:
    parts = parts_of(row(1, 1, 1, 1, 1, 1), row(1, 1, 1, np.nan))
    assert np.isnan(parts["padded, row 1, steps"]["noise_ratio"])
    assert parts["padded, row 1, prompt"]["noise_ratio"] == 1.0


def test_without_a_floor_only_the_spread_is_known() -> None:
    part = parts_of(row(1, 1, 1, 1, 1, 1), row(1, 1, 8, 8), no_floor("none"))["padded, row 1, steps"]
    assert part["noise_ratio"] is None
    assert part["self_consistency"] is None
    assert part["spread"] == 16.0


@pytest.mark.parametrize(("value", "scale", "expected"), [(3.0, 2.0, 1.5), (3.0, None, None), (0.0, 0.0, 0.0), (3.0, 0.0, inf)])
def test_ratio_is_honest_about_a_missing_scale(value: float, scale: float | None, expected: float | None) -> None:
    assert ratio(value, scale) == expected
