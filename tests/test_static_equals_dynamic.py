"""benchmarks/static_equals_dynamic.py: what a tie is and what a difference, one history for both forms, caches without spare slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.static_equals_dynamic import NoSpareSlots, Parting, partings
from validation.calls import StaticCall

ULP = 2.0**-5
"""Of float16 from 32 to 64."""


class Scripted:
    """A decoder that says the same logits [B, V] at every call and keeps what it was given."""

    name, kv_cache, capacity = "scripted", "dynamic", None

    def __init__(self, *rows: list[float], dtype: Any = np.float16) -> None:
        self._logits = np.array(rows, dtype)[:, None, :]
        self.given: list[Any] = []

    def new_cache(self, batch: int, capacity: int = 0) -> list[Any]:
        return []

    def call(self, call: Any, cache: Any) -> list[Any]:
        self.given.append(call.input_ids.tolist())
        return [self._logits]


def parted(dynamic: Scripted, static: Scripted, prompts: list[list[int]] | None = None, steps: int = 1) -> list[Parting]:
    return partings(dynamic, static, prompts or [[5]], steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "ours", "tie"),
    [
        ([39.0, 39.0 + ULP], [39.0, 39.0], True),
        ([39.0, 39.0 + ULP], [39.0 + ULP, 39.0], True),
        ([39.0, 39.0 + 2 * ULP], [39.0, 39.0], False),
        ([39.0, 39.0 + ULP], [39.0 + 2 * ULP, 39.0], False),
        ([-39.0, -39.0 + ULP], [-39.0, -39.0], True),
        ([31.0, 31.0 + ULP], [31.0, 31.0], False),
        ([32.0 - ULP, 32.0], [32.0, 32.0], False),
        ([32.0 - ULP / 2, 32.0], [32.0, 32.0], True),
    ],
)
def test_a_tie_is_between_equal_or_neighbouring_numbers_in_both_forms(theirs: list[float], ours: list[float], tie: bool) -> None:
    (parting,) = parted(Scripted(theirs), Scripted(ours))
    assert (parting.row, parting.step, parting.tokens, parting.is_tie) == (0, 0, (1, 0), tie)


def test_the_dtype_says_what_neighbours_are() -> None:
    rows = [39.0, 39.0 + ULP], [39.0, 39.0]
    assert not parted(*(Scripted(row, dtype=np.float32) for row in rows))[0].is_tie


def test_a_token_that_only_one_form_holds_likely_is_a_difference() -> None:
    """The dynamic form's two best are neighbours, but the static form's choice is none of them."""
    (parting,) = parted(Scripted([39.0, 39.0 + ULP, 10.0]), Scripted([39.0, 39.0, 39.0 + ULP]))
    assert (parting.tokens, parting.is_tie) == ((1, 2), False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_never_equal(bad: float) -> None:
    with np.errstate(invalid="ignore"):
        (parting,) = parted(Scripted([bad, 1.0]), Scripted([bad, 1.0]))
    assert not parting.is_tie


def test_both_go_on_with_the_dynamic_forms_tokens_to_the_end() -> None:
    dynamic, static = Scripted([1.0, 2.0], [2.0, 1.0]), Scripted([2.0, 1.0], [2.0, 1.0])
    found = parted(dynamic, static, [[5], [6]], 3)
    assert [(parting.row, parting.step) for parting in found] == [(0, 0), (0, 1), (0, 2)]
    assert dynamic.given == static.given == [[[5], [6]], [[1], [0]], [[1], [0]]]


def test_the_line_names_row_step_tokens_and_gaps() -> None:
    line = str(Parting(2, 53, (1292, 32), (ULP, 0.0), ULP))
    assert line == "tie in row 2 at step 53: dynamic 1292 by 0.03125, static 32 by 0; one ulp is 0.03125"
    assert str(Parting(2, 53, (1292, 32), (1.0, 0.0), ULP)).startswith("difference in row 2")


def test_a_cache_without_spare_slots_grows_and_keeps_what_was_written() -> None:
    class Graph(Scripted):
        def new_cache(self, batch: int, capacity: int = 0) -> list[Any]:
            return [np.zeros((batch, 1, capacity, 1))]

        def call(self, call: Any, cache: Any) -> list[Any]:
            return [self._logits, *cache]

    graph = NoSpareSlots(Graph([0.0]))  # type: ignore[arg-type]
    ids = np.zeros((1, 1), np.int64)
    cache = graph.new_cache(1, 99)
    assert cache[0].shape[2] == 0
    for past in range(3):
        _, *cache = graph.call(StaticCall(ids, ids + past, ids[0] + past, ids[0] + past + 1, ids[0]), cache)
        assert cache[0].shape[2] == past + 1
        cache[0][:, :, past] = past + 1
    assert cache[0].ravel().tolist() == [1, 2, 3]
