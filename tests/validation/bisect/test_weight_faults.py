"""A weight that is not finite is a fault in whatever form it is stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from validation.bisect.weight_faults import compare_weight
from validation.bisect.weights import Weight


@pytest.mark.parametrize(("levels", "smoothed"), [(None, False), (127, False), (127, True), (None, True)])
def test_a_weight_that_is_not_finite_is_a_fault(levels: int | None, smoothed: bool) -> None:
    exact = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float16).astype(np.float32)
    array = exact.copy()
    array[2, 3] = np.nan
    fault = compare_weight("w", Weight(array, "w", ir.node("Identity", []), levels), exact, "float16", smoothed=smoothed)
    assert (fault.share, fault.words) == (np.inf, "it is not finite, first at [2, 3]")
