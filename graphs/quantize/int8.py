"""INT8 weight-only (W8A16): symmetric, one scale per output channel, activations untouched.

Weight [out, in] ≈ levels int8 · scale [out]        levels are stored [in, out], DequantizeLinear(axis=1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.steps import StepContext
from graphs.quantize.rounding import INT8, Floats, round_plainly
from graphs.quantize.statistics import Statistics
from graphs.quantize.weight_only import Form, quantize_weights

LEVELS = INT8[1]
FORM = Form("int8", ir.DataType.INT8, *INT8, opset=19)


def quantize_int8(step: StepContext, statistics: Statistics | None = None, kept: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write ``int8.onnx`` and ``weights/int8-*.safetensors`` from ``fused.onnx``; arguments, report and errors are ``quantize_weights``'."""
    return quantize_weights(step, FORM, statistics, kept)


def quantize_rows(weight: NDArray[Any], scale_dtype: np.dtype[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Round [out, in] weights plainly, one scale per row.

    Returns:
        int8 [out, in] and scale [out]; the scale is rounded up to its dtype first, so that the largest weight of a row is never clipped.
    """
    levels, scale = round_plainly(weight.astype(np.float32), FORM.grid("", weight.shape[1], scale_dtype))
    return levels, scale[:, 0].astype(scale_dtype)


def round_plainly_by_row(weight: Floats) -> Floats:
    """Weights [out, in] as they are once they are dequantised: plain rounding, one float32 scale a row."""
    levels, scale = quantize_rows(weight, np.dtype(np.float32))
    rounded: Floats = levels * scale[:, None]
    return rounded
