"""Plain rounding of a whole weight: the same as row by row, on any number of blocks and threads."""

from __future__ import annotations

import numpy as np
import pytest

from artifact.errors import QuantizationError
from graphs.quantize.int4 import FORM as INT4
from graphs.quantize.int8 import FORM as INT8
from graphs.quantize.plain import round_weight
from graphs.quantize.rounding import round_plainly
from graphs.quantize.weight_only import Form


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("rows", "threads"), [(1, 2), (3, 1), (50, 1), (50, 3)])
def test_is_round_plainly_of_all_rows(form: Form, dtype: type[np.floating], rows: int, threads: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 128)).astype(dtype)
    weight[0] = 0
    grid = form.grid("w", 128, np.dtype(np.float16))
    found = round_weight(weight, "w", grid, values=7 * 128, threads=threads)
    exact = weight.astype(np.float32)
    levels, scale = round_plainly(exact, grid)
    np.testing.assert_array_equal(found.levels, levels)
    np.testing.assert_array_equal(found.scale, scale)
    error = levels * grid.spread(scale, 128) - exact
    assert found.squares == pytest.approx(float(np.square(exact).sum()), rel=1e-5)
    assert found.error == pytest.approx(float(np.square(error).sum()), rel=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_names_the_first_rows_that_are_not_finite(threads: int) -> None:
    weight = np.ones((6, 8), np.float16)
    weight[[1, 4], 1] = np.nan
    with pytest.raises(QuantizationError, match=r"w\.weight holds NaN or Inf in rows 1 … 1"):
        round_weight(weight, "w", INT8.grid("w", 8, np.dtype(np.float16)), values=8, threads=threads)


def test_no_rows_are_nothing() -> None:
    found = round_weight(np.empty((0, 8), np.float16), "w", INT8.grid("w", 8, np.dtype(np.float16)))
    assert (found.levels.shape, found.scale.shape, found.error) == ((0, 8), (0, 1), 0)
