from __future__ import annotations

import numpy as np
import pytest

from validation.calls import FORMS, Call, StaticCall, Turn, left_padded, right_padded
from validation.row_result import row_results
from validation.scenarios import Scenario

ROWS = (np.arange(10, 16), np.arange(20, 23))
"""Six tokens, and three that begin one call later than they would alone."""
SCENARIO = Scenario("ragged", ROWS, (0, 1), (4, 1, 1))


def test_dynamic_calls_are_padded_on_the_left() -> None:
    first, second, last = left_padded(SCENARIO.turns())
    assert first.input_ids.tolist() == [[10, 11, 12, 13], [0, 0, 0, 20]]
    assert first.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert first.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert (second.start, second.end, second.in_use) == (4, 5, 5)
    assert second.input_ids.tolist() == [[14], [21]]
    assert second.position_ids.tolist() == [[4], [1]]
    assert last.attention_mask.tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert first.last.tolist() == [3, 3]


def test_static_calls_are_padded_on_the_right_and_write_behind_each_rows_own_tokens() -> None:
    first, second, last = right_padded(SCENARIO.turns())
    assert first.input_ids.tolist() == [[10, 11, 12, 13], [20, 0, 0, 0]]
    assert first.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]  # of the slots, padding too
    assert first.write_indices.tolist() == [0, 0]
    assert first.lengths.tolist() == [4, 4]  # padding is written too
    assert first.last.tolist() == [3, 0]
    assert second.input_ids.tolist() == [[14], [21]]
    assert second.position_ids.tolist() == [[4], [1]]
    assert second.write_indices.tolist() == [4, 1]
    assert second.lengths.tolist() == [5, 2]
    assert (first.in_use, last.in_use) == (4, 6)


def test_rows_with_nothing_new_are_padding_alone() -> None:
    turns = [Turn((np.arange(3), np.arange(0)), (0, 0)), Turn((np.arange(3, 5), np.arange(2)), (3, 0))]
    dynamic, static = list(left_padded(turns)), list(right_padded(turns))
    assert dynamic[0].attention_mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert dynamic[1].attention_mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert static[0].last.tolist() == [2, 0]
    assert static[1].write_indices.tolist() == [3, 0]


@pytest.mark.parametrize("kv_cache", ["dynamic", "static"])
def test_inputs_are_int64_with_one_row_a_sequence(kv_cache: str) -> None:
    for call in FORMS[kv_cache].calls(SCENARIO.turns()):
        assert isinstance(call, Call if kv_cache == "dynamic" else StaticCall)
        assert {array.dtype for array in call.inputs().values()} == {np.dtype(np.int64)}
        assert {len(array) for array in call.inputs().values()} == {2}


def test_layouts_are_lazy_so_that_a_turn_may_wait_for_the_call_before_it() -> None:
    said: list[int] = []

    def turns() -> object:
        yield Turn((np.array([1]),), (0,))
        yield Turn((np.array(said),), (1,))

    for form in FORMS.values():
        said.clear()
        calls = form.calls(turns())
        next(calls)
        said.append(7)
        assert next(calls).input_ids.tolist() == [[7]]


@pytest.mark.parametrize("one_position", [False, True], ids=["all positions", "one position"])
@pytest.mark.parametrize("kv_cache", ["dynamic", "static"])
def test_row_results_take_padding_off_both_forms(kv_cache: str, one_position: bool) -> None:
    """A graph whose logits are the ids themselves, and whose caches hold them."""
    form, logits = FORMS[kv_cache], []
    cache = np.full((2, 1, 6 if kv_cache == "dynamic" else 9, 1), -1)
    for call in form.calls(SCENARIO.turns()):
        of_call = call.input_ids[:, :, None]
        logits.append(of_call[np.arange(2), call.last][:, None] if one_position else of_call)
        for row in range(2):
            start = call.start if isinstance(call, Call) else call.write_indices[row]
            cache[row, 0, start : start + call.input_ids.shape[1], 0] = call.input_ids[row]
    for row, (ids, result) in enumerate(zip(ROWS, row_results(SCENARIO, logits, [cache, -cache], form.padding), strict=True)):
        positions = SCENARIO.last_positions(row) if one_position else np.arange(len(ids))
        assert result.positions.tolist() == positions.tolist()
        assert result.logits[:, 0].tolist() == ids[positions].tolist()
        assert result.keys[0][0, :, 0].tolist() == ids.tolist()
        assert result.values[0][0, :, 0].tolist() == (-ids).tolist()
