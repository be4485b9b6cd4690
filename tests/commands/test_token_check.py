"""commands/token_check.py: each row is judged by its own logits, and what can't be judged is no pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from commands.token_check import check_tokens


class Fixed:
    """A decoder that gives the same logits [B, V] at every call."""

    name, kv_cache, capacity = "fixed", "dynamic", None

    def __init__(self, *rows: list[float]) -> None:
        self._logits = np.array(rows, np.float32)[:, None, :]

    def new_cache(self, batch: int, capacity: int = 0) -> list[Any]:
        return []

    def call(self, call: Any, cache: Any) -> list[Any]:
        return [self._logits]


def judge(plan: list[list[float]], graph: list[list[float]]) -> dict[str, Any]:
    return check_tokens(Fixed(*plan), Fixed(*graph), [[1]] * len(plan), 2)  # type: ignore[arg-type]


def test_a_row_is_judged_by_its_own_largest_logit() -> None:
    """The second row's logits are so large that the first's error would be small beside them."""
    report = judge([[1.0, 0.0], [900.0, 1.0]], [[0.0, 5.0], [900.0, 1.0]])
    assert report == {
        "checked": 4, "equal": 2, "decisive": 2, "passed": False,
        "first": {"row": 0, "position": 0, "plan": 0, "graph": 1, "margin": 1.0},
    }  # fmt: skip


def test_tokens_that_are_near_each_other_are_no_failure() -> None:
    report = judge([[1.0, 0.0]], [[9.9, 10.0]])
    assert (report["equal"], report["decisive"], report["passed"]) == (0, 0, True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_graph_that_gives_no_numbers_has_judged_nothing(bad: float) -> None:
    report = judge([[1.0, 0.0]], [[bad, 0.0]])
    assert (report["decisive"], report["passed"], report["first"]["margin"]) == (2, False, None)
