from __future__ import annotations

import pytest

from validation import time_left
from validation.time_left import TimeLeft


@pytest.mark.parametrize(
    ("passed", "done", "expected"),
    [(5.0, 0, ""), (5.0, 1, ", 45 s left"), (60.0, 1, ", 9 min left"), (60.0, 9, ""), (18.0, 2, ", 72 s left")],
)
def test_the_rest_costs_what_the_first_pieces_did(passed: float, done: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = TimeLeft(10, start=100.0)
    monkeypatch.setattr(time_left.time, "monotonic", lambda: 100.0 + passed)
    assert clock.left(done) == expected
