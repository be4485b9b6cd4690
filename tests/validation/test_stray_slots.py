from __future__ import annotations

import numpy as np
import pytest

from validation.scenarios import Scenario
from validation.stray_slots import UNWRITTEN, stray_slots

SCENARIO = Scenario("padded", (np.arange(6), np.arange(3)), (0, 1), (4, 1, 1))
"""Row 0 writes slots 0 to 5; row 1 writes 0 to 3 (one token and padding), then 1 and 2."""


@pytest.fixture
def caches() -> list[np.ndarray]:
    """Keys and values of two layers, as a sound graph leaves them."""
    tensors = [np.full((2, 2, 9, 4), UNWRITTEN, np.float16) for _ in range(4)]
    for tensor in tensors:
        tensor[0, :, :6], tensor[1, :, :4] = 1, 2
    return tensors


def test_sound_caches_have_no_strays(caches: list[np.ndarray]) -> None:
    assert [stray_slots(SCENARIO, row, caches) for row in (0, 1)] == [[], []]


def test_a_write_beyond_a_rows_slots_is_named(caches: list[np.ndarray]) -> None:
    caches[1][0, 1, 7, 3] = 0
    caches[2][1, 0, 4, 0] = np.nan
    assert stray_slots(SCENARIO, 0, caches) == ["present.0.value slot 7 has changed"]
    assert stray_slots(SCENARIO, 1, caches) == ["present.1.key slot 4 has changed"]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_padding_that_is_not_finite_is_named_and_real_tokens_are_others_business(caches: list[np.ndarray], poison: float) -> None:
    caches[3][1, 1, 3, 2] = poison
    caches[0][1, 0, 2, 0] = poison
    assert stray_slots(SCENARIO, 1, caches) == ["present.1.value slot 3 holds padding that is not finite"]
