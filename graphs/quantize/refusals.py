"""What of a graph no calibration can mend: refused before minutes of measuring, not after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from artifact.steps import StepContext
from graphs.quantize import int4, int8
from graphs.quantize.blocks import open_fused_onnxruntime
from graphs.quantize.islands import check_float32_sums
from graphs.quantize.smoothing_file import SMOOTHED
from graphs.quantize.weight_only import Form, open_fused
from graphs.quantize.writer import shape_of

FORMS: Mapping[str, Form] = {"int8": int8.FORM, "int8-smoothquant": int8.FORM, "int4": int4.FORM}
"""Scheme for TensorRT → how it stores weights."""


def check_graph(artifact: Path, scheme: str, target: str) -> None:
    """Read the target's fused graph, without its weights.

    Raises:
        QuantizationError: it is quantised already, is of an older opset, or has no linears; a linear has no block, or sums in float16 what would
            be int8 by int8.
    """
    if target == "onnxruntime":
        open_fused_onnxruntime(artifact)
        return
    form = FORMS[scheme]
    _, _, chosen = open_fused(StepContext(artifact), scheme, form.opset)
    for linear in chosen:
        if form.block_of is not None:
            form.block_of(linear.name, shape_of(linear.weight)[1])
        if scheme in SMOOTHED:
            check_float32_sums(linear)
