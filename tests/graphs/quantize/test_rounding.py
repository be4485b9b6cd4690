"""graphs/quantize/rounding.py: a block uses its whole range, and levels are stored as MatMulNBits reads them."""

from __future__ import annotations

import numpy as np

from graphs.quantize.rounding import Format, pack, round_to_nearest


def test_a_block_uses_its_whole_range():
    rows = np.array([[[0.5, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], np.float32)
    levels, scale = round_to_nearest(rows, Format(8, 4))
    np.testing.assert_array_equal(levels, [[[32, -127, 64, 0], [0, 0, 0, 0]]])
    np.testing.assert_allclose(scale, [[2 / 127, 1]])
    levels, scale = round_to_nearest(-rows, Format(4, 4))
    np.testing.assert_array_equal(levels, [[[2, -8, 4, 0], [0, 0, 0, 0]]])
    np.testing.assert_allclose(scale, [[-0.25, 1]])


def test_levels_are_raised_to_the_middle_and_two_of_four_bits_share_a_byte():
    levels = np.array([[[-8, 7, 0, 1]]], np.int16)
    np.testing.assert_array_equal(pack(levels, Format(4, 4)), [[[0xF0, 0x98]]])
    np.testing.assert_array_equal(pack(levels, Format(8, 4)), [[[120, 135, 128, 129]]])
