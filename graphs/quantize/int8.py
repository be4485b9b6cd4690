"""INT8 weight-only (W8A16): symmetric, one scale per output channel, activations untouched.

Before:  x ─ MatMul(Transpose(weight float [out, in]))
After:   x ─ MatMul(Transpose(DequantizeLinear(weight_int8 [out, in], weight_scale [out], axis=0)))
         The casts of a linear that adds up in float32 stay where they are.

The linears of the layers are quantised; embedding and lm_head keep their precision. Weights are read and written one tensor at a time, in
blocks of rows.
Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY, layer_of
from artifact.steps import StepContext, require
from artifact.tensor_file import StoredTensor
from graphs.quantize.linears import Linear, find_linears
from graphs.quantize.statistics import Statistics
from graphs.quantize.writer import SAFETENSORS, Piece, add_initializer, read_mapped, row_blocks, shape_of, write_pieces

LEVELS = 127
"""Symmetric: −127 … 127, so that a weight and its negative quantise alike."""


def quantize_int8(step: StepContext, statistics: Statistics | None = None) -> dict[str, Any]:
    """Write ``int8.onnx`` and ``weights/int8-*.safetensors`` from ``fused.onnx``.

    Args:
        step: the artifact.
        statistics: what calibration measured of activations; None rounds plainly.

    Returns:
        scheme, linears, quantized, kept, bytes, nodes, weight_error (root mean square, relative to the weights').

    Raises:
        QuantizationError: the graph is quantised already, has no linears, or a weight holds NaN or Inf.
    """
    model = load_graph(require(step.artifact, "fused.onnx"))
    if any(node.op_type in ("DequantizeLinear", "QuantizeLinear") for node in model.graph):
        raise QuantizationError("fused.onnx is quantised already", hint=f"python cli.py fuse {step.artifact} --force")
    linears = list(find_linears(model.graph))
    chosen = [linear for linear in linears if layer_of(linear.name) is not None]
    if not chosen:
        hint = f"python cli.py inspect {step.artifact}/fused.onnx"
        raise QuantizationError("fused.onnx holds no MatMul by a constant weight [out, in] in a decoder layer", hint=hint)
    errors: dict[str, float] = {}
    stored = write_pieces(step, "int8", [_piece(step, linear, errors) for linear in chosen])
    for linear in chosen:
        _dequantize(model.graph, linear, stored)
    with step.write("int8.onnx") as temporary:
        ir.save(model, temporary)
    worst = max(errors, key=lambda name: errors[name])
    kept = [
        {"name": linear.matmul.metadata_props.get(MODULE_KEY, linear.name), "reason": "the output layer keeps its precision"}
        for linear in linears
        if linear not in chosen
    ]
    return {
        "scheme": "int8",
        "linears": len(linears),
        "quantized": len(chosen),
        "kept": [{"name": "model.embed_tokens", "reason": "the embedding is looked up, not multiplied"}, *kept],
        "bytes": sum(tensor.length for tensor in stored.values()),
        "nodes": model.graph.num_nodes(),
        "weight_error": {"worst": worst, "worst_rms": errors[worst], "mean_rms": sum(errors.values()) / len(errors)},
    }


def quantize_rows(weight: NDArray[Any], scale_dtype: np.dtype[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Quantise [out, in] weights, one scale per row.

    Returns:
        int8 [out, in] and scale [out]; the scale is rounded up to its dtype first, so that the largest weight of a row is never clipped.
    """
    largest = np.abs(weight.astype(np.float32)).max(axis=1, initial=0.0)
    exact = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    scale = exact.astype(scale_dtype)
    scale = np.where(scale.astype(np.float32) < exact, np.nextafter(scale, scale_dtype.type(np.inf)), scale)
    levels = np.rint(weight.astype(np.float32) / scale.astype(np.float32)[:, None])
    return np.clip(levels, -LEVELS, LEVELS).astype(np.int8), scale


def _piece(step: StepContext, linear: Linear, errors: dict[str, float]) -> Piece:
    """A linear's levels [out, in] and scales [out]; its relative root mean square error is added to ``errors``."""
    rows, columns = shape_of(linear.weight)
    dtype = SAFETENSORS[linear.weight.dtype or ir.DataType.FLOAT16]

    def make() -> Iterator[NDArray[Any]]:
        levels, scale, errors[linear.name] = read_mapped(linear.weight, step.artifact, lambda weight: _round_rows(weight, linear.name))
        yield levels
        yield scale

    return Piece(linear.name, {f"{linear.name}.weight_int8": ("I8", (rows, columns)), f"{linear.name}.weight_scale": (dtype, (rows,))}, make)


def _round_rows(weight: NDArray[Any], name: str) -> tuple[NDArray[np.int8], NDArray[Any], float]:
    """Levels [out, in], scale [out] and relative root mean square error of one weight; float32 copies of a block of rows at a time."""
    levels, scale = np.empty(weight.shape, np.int8), np.empty(weight.shape[0], weight.dtype)
    squared = total = 0.0
    for rows, exact in row_blocks(weight, name):
        levels[rows], scale[rows] = quantize_rows(exact, weight.dtype)
        squared += float(np.square(levels[rows] * scale[rows].astype(np.float32)[:, None] - exact).sum())
        total += float(np.square(exact).sum())
    return levels, scale, (squared / total) ** 0.5 if total else 0.0


def _dequantize(graph: ir.Graph, linear: Linear, stored: dict[str, StoredTensor]) -> None:
    """Put DequantizeLinear between the stored int8 weight and the transpose."""
    dtypes = {"int8": ir.DataType.INT8, "scale": linear.weight.dtype or ir.DataType.FLOAT16}
    operands = [add_initializer(graph, stored[f"{linear.name}.weight_{suffix}"], dtype) for suffix, dtype in dtypes.items()]
    output = ir.Value(name=f"{linear.name}.DequantizeLinear", shape=linear.weight.shape, type=linear.weight.type)
    module = {MODULE_KEY: linear.name}
    node = ir.Node("", "DequantizeLinear", operands, [ir.AttrInt64("axis", 0)], outputs=[output], name=output.name, metadata_props=module)
    graph.insert_before(linear.transpose, node)
    linear.transpose.replace_input_with(0, output)
    if not linear.weight.uses():
        del graph.initializers[str(linear.weight.name)]
