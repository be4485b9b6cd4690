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
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_is_round_plainly_of_all_rows(form: Form, dtype: type[np.floating], rows: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 128)).astype(dtype)
    weight[0] = 0
    grid = form.grid("w", 128, np.dtype(np.float16))
    found = round_weight(weight, "w", grid, values=7 * 128)
    exact = weight.astype(np.float32)
    levels, scale = round_plainly(exact, grid)
    np.testing.assert_array_equal(found.levels, levels)
    np.testing.assert_array_equal(found.scale, scale)
    error = levels * grid.spread(scale, 128) - exact
    assert found.squares == pytest.approx(float(np.square(exact).sum()), rel=1e-5)
    assert found.error == pytest.approx(float(np.square(error).sum()), rel=1e-4)


def test_names_the_rows_that_are_not_finite() -> None:
    weight = np.ones((5, 8), np.float16)
    weight[3, 1] = np.nan
    with pytest.raises(QuantizationError, match=r"w\.weight holds NaN or Inf in rows 0 … 4"):
        round_weight(weight, "w", INT8.grid("w", 8, np.dtype(np.float16)))
