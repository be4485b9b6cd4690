"""Placement against costs that are known: additive, more than additive, less, and a limit that nothing keeps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from graphs.quantize.placement import ROOM, TRIES, Candidate, Measured, Try, choose, gate_of, nats_of, place, reasons

COSTS = {f"linear-{index}": float(cost) for index, cost in enumerate(np.geomspace(1e-5, 3e-3, 14))}
CANDIDATES = [Candidate(name, cost, 100 + 13 * index % 50) for index, (name, cost) in enumerate(COSTS.items())]
SIZES = {candidate.name: candidate.bytes_saved for candidate in CANDIDATES}


def measuring(power: float = 1.0, paid: float = 0.0, noise_pct: float = 0.0) -> Callable[[frozenset[str]], Measured]:
    """The sum of the costs to a power (times itself: what exceeds the limit by more, or by less), and what is paid anyway."""

    def measure(names: frozenset[str]) -> Measured:
        total = paid + (sum(COSTS[name] for name in names) / 0.005) ** power * 0.005
        return Measured(total, 100 * np.expm1(total) + noise_pct, 0.0, 2048)

    return measure


def size(names: frozenset[str]) -> int:
    return sum(SIZES[name] for name in names)


def best(measure: Callable[[frozenset[str]], Measured], limit_pct: float) -> int:
    """Of all 2^14 sets."""
    names = list(COSTS)
    sets = (frozenset(chosen) for count in range(len(names) + 1) for chosen in combinations(names, count))
    return max(size(one) for one in sets if measure(one).holds(limit_pct))


@pytest.mark.parametrize("power", [1.0, 1.3, 0.7], ids=["additive", "dearer together", "cheaper together"])
def test_chooses_nearly_the_largest_set_that_holds(power: float) -> None:
    measure, limit_pct = measuring(power), 0.4
    placement = place(CANDIDATES, limit_pct, measure)
    assert placement.chosen is not None
    assert placement.chosen.measured == measure(placement.chosen.quantised)
    assert placement.chosen.measured.holds(limit_pct)
    assert size(placement.chosen.quantised) >= 0.9 * best(measure, limit_pct)
    assert len(placement.tries) <= TRIES + 1
    assert all(tried.budget > 0 for tried in placement.tries[1:])


def test_takes_everything_where_everything_holds() -> None:
    placement = place(CANDIDATES, 5.0, measuring())
    assert placement.chosen is not None
    assert placement.chosen.quantised == set(COSTS)
    assert len(placement.tries) == 2


def test_what_is_paid_anyway_is_taken_off_the_budget() -> None:
    placement = place(CANDIDATES, 0.4, measuring(paid=0.002))
    assert placement.chosen is not None
    assert placement.tries[1].budget == pytest.approx(gate_of(0.4) / ROOM - 0.002)
    assert sum(COSTS[name] for name in placement.chosen.quantised) <= nats_of(0.4) - 0.002


@pytest.mark.parametrize("measure", [measuring(paid=0.01), measuring(noise_pct=3.0)], ids=["too dear already", "perplexity alone"])
def test_a_limit_that_is_broken_with_nothing_quantised_is_not_met(measure: Callable[[frozenset[str]], Measured]) -> None:
    placement = place(CANDIDATES, 0.4, measure)
    assert placement.chosen is None
    assert [tried.quantised for tried in placement.tries] == [placement.nearest.quantised] == [frozenset()]


def test_a_limit_that_the_cheapest_linear_breaks_is_not_met_and_that_one_came_nearest() -> None:
    placement = place(CANDIDATES, 1e-4, measuring())
    assert placement.chosen is None
    assert placement.nearest.quantised == {"linear-0"}
    assert placement.nearest.measured.kl == pytest.approx(1e-5)


def test_the_cheapest_by_byte_come_first_and_what_is_too_dear_is_passed_over() -> None:
    candidates = [Candidate("large", 0.3, 600), Candidate("dear", 0.9, 700), Candidate("small", 0.1, 100)]
    assert choose(candidates, 0.45) == {"large", "small"}
    assert choose(candidates, 0.3) == {"large"}
    assert choose(candidates, 0.2) == {"small"}
    assert choose(candidates, 0.05) == frozenset()


def test_every_linear_that_is_kept_has_a_reason_with_its_number() -> None:
    measured = measuring()(frozenset())
    found = reasons([Candidate("a", 0.002, 1), Candidate("b", 0.004, 1)], Try(frozenset({"a"}), 0.01, measured))
    assert found == {"b": "alone it costs 0.004 nats, 40% of what all may"}
    assert reasons([Candidate("a", 0.002, 1)], Try(frozenset(), 0.0, measured)) == {"a": "nothing may be lost"}


@pytest.mark.parametrize(
    ("kl", "increase", "error", "holds"), [(0.0124, 0.9, 0.1, True), (0.0125, 0.1, 0.1, False), (0.001, 1.01, 0.5, False), (0.001, 1.0, 0.5, True)]
)
def test_a_limit_holds_for_divergence_and_for_perplexity(kl: float, increase: float, error: float, holds: bool) -> None:
    assert Measured(kl, increase, error, 2048).holds(1.0) is holds
