"""Working ahead: the order, how far ahead, and what a failure does."""

from __future__ import annotations

from threading import Event

import pytest

from artifact.ahead import ahead


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_keeps_the_order(count: int) -> None:
    assert list(ahead(lambda item: item * item, range(count))) == [item * item for item in range(count)]


def test_no_more_than_so_many_items_are_begun_before_they_are_wanted() -> None:
    begun: list[int] = []
    results = ahead(begun.append, range(10), threads=2)
    for taken in range(1, 9):
        next(results)
        assert len(begun) <= taken + 2


def test_the_next_items_are_begun_while_one_is_used() -> None:
    begun = [Event() for _ in range(4)]
    results = ahead(lambda item: begun[item].set(), range(4), threads=2)
    next(results)
    assert begun[2].wait(10)


def test_a_reader_that_stops_early_ends_the_work() -> None:
    begun: list[int] = []
    results = ahead(begun.append, range(10))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 3


def test_a_failure_comes_at_its_place() -> None:
    results = ahead(lambda item: 1 // item, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
