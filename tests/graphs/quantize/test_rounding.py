"""graphs/quantize/rounding.py: which levels and scales there are, and how they are stored."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.quantize.int8 import FORM, LEVELS
from graphs.quantize.rounding import TURNED_COLUMNS, TURNED_ROWS, Format, Grid, largest_over, nibbles, pack, round_plainly, rounded_up, turned

HALF = np.dtype(np.float16)


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels [out, in] and scales [out] of weights with one scale a row."""
    levels, scale = round_plainly(weight.astype(np.float32), FORM.grid("w", weight.shape[1], HALF))
    return levels, scale[:, 0]


def test_a_block_of_onnx_runtime_uses_its_whole_range() -> None:
    rows = np.array([[0.5, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    levels, scale = round_plainly(rows, Format(8, 4).grid(np.dtype(np.float32)))
    np.testing.assert_array_equal(levels, [[32, -127, 64, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scale, [[2 / 127, 1]])
    levels, scale = round_plainly(-rows, Format(4, 4).grid(np.dtype(np.float32)))
    np.testing.assert_array_equal(levels, [[2, -8, 4, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scale, [[-0.25, 1]])


def test_scales_of_onnx_runtime_are_those_that_are_stored() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    _, scale = round_plainly(rows, Format(4, 16).grid(HALF))
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))


def test_levels_are_raised_to_the_middle_and_two_of_four_bits_share_a_byte() -> None:
    levels = np.array([[[-8, 7, 0, 1]]], np.int8)
    np.testing.assert_array_equal(pack(levels, Format(4, 4)), [[[0xF0, 0x98]]])
    np.testing.assert_array_equal(pack(levels, Format(8, 4)), [[[120, 135, 128, 129]]])
    np.testing.assert_array_equal(nibbles(levels), [[[0x78, 0x10]]])


def test_last_block_of_a_row_is_filled_up_with_zeros() -> None:
    grid = Grid(-7, 7, 4, largest_over(7, HALF))
    rows = np.arange(1, 7, dtype=np.float32)[None]
    np.testing.assert_array_equal(grid.blocked(rows), [[[1, 2, 3, 4], [5, 6, 0, 0]]])
    levels, scale = round_plainly(rows, grid)
    assert (levels.shape, scale.shape, grid.blocks(6)) == ((1, 6), (1, 2), 2)
    np.testing.assert_allclose(levels * grid.spread(scale, 6), rows, atol=0.5 * scale.max())


def test_rows_are_within_half_a_level_and_never_clipped() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float16)
    levels, scale = int8_rows(weight)
    assert np.abs(levels).max(axis=1).min() >= LEVELS - 1
    error = np.abs(levels * scale[:, None] - weight.astype(np.float32))
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-6)).all()


@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 6e4])
def test_rows_of_any_magnitude_keep_their_largest_weight(magnitude: float) -> None:
    weight = (np.linspace(-1, 1, 16)[None] * magnitude).astype(np.float16)
    levels, scale = int8_rows(weight)
    assert np.isfinite(scale).all()
    assert np.abs(levels).max() <= LEVELS
    assert np.abs(levels * scale[:, None] - weight.astype(np.float32)).max() <= 0.5 * float(scale[0])


def test_row_of_zeros_stays_zero() -> None:
    levels, scale = int8_rows(np.zeros((1, 4), np.float16))
    assert not levels.any()
    assert scale[0] == 1


def test_symmetric_weights_quantise_alike() -> None:
    weight = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float16)
    assert np.array_equal(int8_rows(weight)[0], -int8_rows(-weight)[0])


def test_scales_are_rounded_up_to_their_dtype() -> None:
    exact = np.random.default_rng(3).uniform(1e-6, 10, 1000).astype(np.float32)
    stored = rounded_up(exact, HALF)
    assert (stored >= exact).all()
    assert (stored <= exact * (1 + 2**-10) + 2**-24).all()
    np.testing.assert_array_equal(stored, stored.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 3), (TURNED_ROWS, 8), (2 * TURNED_ROWS + 5, 70), (3, 2 * TURNED_COLUMNS + 1)])
def test_turned_levels_are_the_transpose_in_memory_order(shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    blocks = list(turned(levels))
    assert all(block.flags.c_contiguous for block in blocks)
    assert np.array_equal(np.concatenate(blocks), levels.T)
