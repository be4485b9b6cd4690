from __future__ import annotations

from itertools import pairwise

import pytest

from validation.render.scales import Scale, index_ticks, scale_for, spread


def test_scale_is_linear_from_zero_for_values_of_one_size() -> None:
    scale = scale_for([0.7, 0.9, 2.0])
    assert (scale.low, scale.logarithmic) == (0.0, False)
    assert scale.high == pytest.approx(2.2)


def test_scale_is_logarithmic_for_values_far_apart() -> None:
    scale = scale_for([0.7, 2.0, 15.2])
    assert scale.logarithmic
    assert scale.at(15.2, (100.0, 0.0)) < scale.at(2.0, (100.0, 0.0)) < scale.at(0.7, (100.0, 0.0))


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0]])
def test_scale_of_nothing_positive_is_the_unit(values: list[float]) -> None:
    assert scale_for(values) == Scale(0.0, 1.0, logarithmic=False)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 300.0), (-1.0, 300.0), (0.5, 200.0), (1.0, 100.0), (9.0, 100.0)])
def test_scale_maps_into_its_edges(value: float, expected: float) -> None:
    assert Scale(0.0, 1.0, logarithmic=False).at(value, (300.0, 100.0)) == expected


def test_logarithmic_scale_puts_zero_on_its_lower_edge() -> None:
    assert Scale(0.01, 10.0, logarithmic=True).at(0.0, (300.0, 100.0)) == 300.0


@pytest.mark.parametrize("values", [[0.3, 0.9], [2.0, 0.6], [15.2, 0.7], [1e-7, 1e5], [1e-3, 1.0], [4e4, 1e5], [0.0123, 0.0072, 0.11]])
def test_scale_has_a_readable_number_of_ticks_inside(values: list[float]) -> None:
    scale = scale_for(values)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    assert all(scale.low <= tick <= scale.high * (1 + 1e-9) for tick in ticks)
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("length", "first", "most", "expected"),
    [
        (30, 0, 12, [0, 5, 10, 15, 20, 25]), (80, 0, 12, [0, 10, 20, 30, 40, 50, 60, 70]), (64, 1, 12, [1, 10, 20, 30, 40, 50, 60]),
        (1, 0, 12, [0]), (4, 1, 12, [1, 2, 3, 4]), (0, 0, 12, []),
    ],
)  # fmt: skip
def test_index_ticks_are_round(length: int, first: int, most: int, expected: list[int]) -> None:
    assert index_ticks(length, first, most) == expected


def test_spread_moves_labels_apart_and_keeps_their_order() -> None:
    places = [50.0, 50.0, 52.0, 200.0, 199.0]
    moved = spread(places, 16, 0, 200)
    ordered = sorted(moved)
    assert all(after - before >= 16 - 1e-9 for before, after in pairwise(ordered))
    assert max(moved) <= 200
    assert moved.index(max(moved)) == 3
    assert spread([], 16, 0, 100) == []


def test_spread_stays_above_the_lower_end() -> None:
    assert spread([10.0, 10.0, 10.0], 16, 10, 300) == [10.0, 26.0, 42.0]
