"""INT4 weight-only (W4A16): symmetric, one scale for each block of a row, activations untouched.

Weight [out, in] ≈ levels int4 [out, in] · scale [out, in / block]        DequantizeLinear(axis=1, block_size=block)

The block is the widest of 128, 64 and 32 that divides the row: a plan keeps the levels packed, 0.52 to 0.56 bytes a weight.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from artifact.errors import QuantizationError
from artifact.steps import StepContext
from graphs.quantize.rounding import INT4
from graphs.quantize.statistics import Statistics
from graphs.quantize.weight_only import Form, quantize_weights

BLOCKS = (128, 64, 32)


def block_of(name: str, columns: int) -> int:
    """Columns that share a scale.

    Raises:
        QuantizationError: no block divides the row.
    """
    block = next((size for size in BLOCKS if columns % size == 0), None)
    if block is None:
        message = f"{name}: rows of {columns} weights can't be cut into blocks of {', '.join(map(str, BLOCKS))}"
        raise QuantizationError(message, hint="quantize --scheme int8 needs no blocks")
    return block


FORM = Form("int4", ir.DataType.INT4, *INT4, opset=21, block_of=block_of)
"""A scale is positive, so the largest weight of a block is 7; −8 is there for what data-driven rounding finds."""


def quantize_int4(step: StepContext, statistics: Statistics | None = None) -> dict[str, Any]:
    """Write ``int4.onnx`` and ``weights/int4-*.safetensors`` from ``fused.onnx``; arguments, report and errors are ``quantize_weights``'."""
    return quantize_weights(step, FORM, statistics)
