"""validation/placement_text.py: sets are measured on what was neither calibrated nor scored on."""

from __future__ import annotations

import numpy as np

from validation.calibration_text import CalibrationText
from validation.placement_text import TOKENS, left_over
from validation.scoring import choose_sequences, pieces_of

LENGTH = 256


def text(pieces: int) -> CalibrationText:
    """Every token says of which piece it is."""
    whole = [np.full(LENGTH, 10 + index) for index in range(pieces)]
    return CalibrationText((np.full(LENGTH, 1), np.full(LENGTH, 2)), None, "t.txt", "abc", 1, (np.full(5, 3), *whole))


def test_takes_whole_pieces_that_no_linear_was_scored_on() -> None:
    scored = pieces_of(text(40), 512)
    pieces = left_over(text(40), scored)
    assert {len(piece) for piece in pieces} == {LENGTH}
    used = {int(piece[0]) for piece in choose_sequences(text(40), 512)[0]}
    assert len(used) == scored == 8
    assert used.isdisjoint(int(piece[0]) for piece in pieces)
    assert sum(len(piece) - 1 for piece in pieces) >= TOKENS > sum(len(piece) - 1 for piece in pieces[:-1])


def test_takes_what_there_is_where_little_is_left() -> None:
    assert [int(piece[0]) for piece in left_over(text(9), 8)] == [18]
    assert left_over(text(8), 8) == []
