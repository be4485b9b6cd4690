"""A weight that is not finite is a fault in whatever form it is stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.quantize.rounding import Grid, largest_over
from validation.bisect.smoothed import Factors
from validation.bisect.weight_faults import compare_weight
from validation.bisect.weights import Weight

INT8 = Grid(-127, 127, 16, largest_over(127, np.dtype(np.float32)))


@pytest.mark.parametrize(("grid", "factors"), [(None, None), (INT8, None), (INT8, Factors()), (None, Factors())])
def test_a_weight_that_is_not_finite_is_a_fault(grid: Grid | None, factors: Factors | None) -> None:
    exact = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float16).astype(np.float32)
    array = exact.copy()
    array[2, 3] = np.nan
    fault = compare_weight("w", Weight(array, "w", ir.node("Identity", []), grid), exact, factors)
    assert (fault.share, fault.words) == (np.inf, "it is not finite, first at [2, 3]")
