"""INT8 weight-only (W8A16): symmetric, one scale per output channel, activations untouched.

Weight [out, in] ≈ levels int8 [out, in] · scale [out]        DequantizeLinear(axis=0)
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from artifact.steps import StepContext
from graphs.quantize.statistics import Statistics
from graphs.quantize.weight_only import Form, quantize_weights

LEVELS = 127
"""Symmetric: −127 … 127, so that a weight and its negative quantise alike."""
FORM = Form("int8", ir.DataType.INT8, -LEVELS, LEVELS, opset=19)


def quantize_int8(step: StepContext, statistics: Statistics | None = None) -> dict[str, Any]:
    """Write ``int8.onnx`` and ``weights/int8-*.safetensors`` from ``fused.onnx``; arguments, report and errors are ``quantize_weights``'."""
    return quantize_weights(step, FORM, statistics)
