"""Float16 to float32: every bit pattern there is, and what is not finite."""

from __future__ import annotations

import numpy as np
import pytest

from artifact.half import all_finite, widened

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_finite_number_is_converted_bit_for_bit() -> None:
    finite = EVERY[np.isfinite(EVERY)]
    assert len(finite) == 2 * 0x7C00
    np.testing.assert_array_equal(widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


def test_a_processor_that_takes_subnormal_numbers_for_zero_changes_nothing() -> None:
    """As a library built with fast math may have told it to: the product would give zero, and is not taken then."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        found = widened(EVERY[:0x500])
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found.view(np.uint32), EVERY[:0x500].astype(np.float32).view(np.uint32))


def test_writes_where_it_is_told_and_takes_rows_of_a_wider_array() -> None:
    values = EVERY[: 6 * 8].reshape(6, 8)
    out = np.full((6, 3), np.nan, np.float32)
    assert widened(values[:, 2:5], out) is out
    np.testing.assert_array_equal(out, values[:, 2:5].astype(np.float32))


def test_float32_is_copied() -> None:
    values = np.ones((2, 2), np.float32)
    assert not np.shares_memory(widened(values), values)
    np.testing.assert_array_equal(widened(values), values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
def test_what_is_not_finite_is_seen(dtype: type[np.floating], bad: float) -> None:
    values = np.full((3, 5), np.finfo(dtype).max, dtype)
    scratch = np.empty_like(values, np.float32)
    assert all_finite(values)
    assert all_finite(-values, scratch)
    values[2, 4] = bad
    assert not all_finite(values)
    assert not all_finite(values, scratch)


def test_nothing_is_finite() -> None:
    assert all_finite(np.empty((0, 4), np.float16))
