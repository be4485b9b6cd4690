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
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY, layer_of
from artifact.steps import StepContext, require
from artifact.tensor_file import StoredTensor, checksums_json, plan_tensors, write_tensors
from graphs.quantize.linears import Linear, find_linears
from graphs.quantize.statistics import Statistics

Floats = NDArray[np.float32]
CHECKSUMS = "weights/int8-checksums.json"
LEVELS = 127
"""Symmetric: −127 … 127, so that a weight and its negative quantise alike."""
ROW_BLOCK_VALUES = 1 << 24
SAFETENSORS = {ir.DataType.FLOAT16: "F16", ir.DataType.FLOAT: "F32"}


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
    stored, errors = _write_weights(step, chosen)
    by_name = {tensor.name: tensor for tensor in stored}
    for linear in chosen:
        _dequantize(model.graph, linear, by_name)
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
        "bytes": sum(tensor.length for tensor in stored),
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


def _write_weights(step: StepContext, linears: list[Linear]) -> tuple[list[StoredTensor], dict[str, float]]:
    """One file a layer, in the order of the graph; returns what was stored and each linear's relative error."""
    stored: list[StoredTensor] = []
    errors: dict[str, float] = {}
    for done, (layer, group) in enumerate(groupby(linears, key=lambda linear: layer_of(linear.name) or 0)):
        step.progress(f"quantising layer {layer}", done, (layer_of(linears[-1].name) or 0) + 1)
        members = list(group)
        file = f"weights/int8-layer-{layer:03d}.safetensors"
        header, planned = plan_tensors(file, _shapes(members))
        with step.write(file) as temporary:
            stored += write_tensors(temporary, header, planned, _quantized(members, errors, step))
    with step.write(CHECKSUMS) as temporary:
        temporary.write_text(checksums_json(stored), encoding="utf-8")
    return stored, errors


def _shapes(linears: list[Linear]) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for linear in linears:
        assert linear.weight.shape is not None
        rows, columns = linear.weight.shape.numpy()
        shapes[f"{linear.weight.name}_int8"] = ("I8", (rows, columns))
        shapes[f"{linear.weight.name}_scale"] = (SAFETENSORS[linear.weight.dtype or ir.DataType.FLOAT16], (rows,))
    return shapes


def _quantized(linears: list[Linear], errors: dict[str, float], step: StepContext) -> Iterator[memoryview]:
    """Each linear's levels and scales, one linear in memory at a time."""
    for linear in linears:
        tensor = linear.weight.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = step.artifact
        levels, scale, errors[linear.name] = _quantize_blocks(tensor, str(linear.weight.name))
        yield levels.data.cast("B")
        yield scale.data.cast("B")
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()


def _quantize_blocks(tensor: ir.TensorProtocol, name: str) -> tuple[NDArray[np.int8], NDArray[Any], float]:
    """Levels [out, in], scale [out] and relative root mean square error of one weight; float32 copies of a block of rows at a time."""
    weight = tensor.numpy()
    levels, scale = np.empty(weight.shape, np.int8), np.empty(weight.shape[0], weight.dtype)
    squared = total = 0.0
    block = max(1, ROW_BLOCK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], block):
        rows = slice(start, start + block)
        exact = weight[rows].astype(np.float32)
        if not np.isfinite(exact).all():
            raise QuantizationError(f"{name} holds NaN or Inf in rows {start} … {start + len(exact) - 1}")
        levels[rows], scale[rows] = quantize_rows(weight[rows], weight.dtype)
        squared += float(np.square(levels[rows] * scale[rows].astype(np.float32)[:, None] - exact).sum())
        total += float(np.square(exact).sum())
    return levels, scale, (squared / total) ** 0.5 if total else 0.0


def _dequantize(graph: ir.Graph, linear: Linear, stored: dict[str, StoredTensor]) -> None:
    """Put DequantizeLinear between the stored int8 weight and the transpose."""
    operands = []
    for suffix, dtype in (("int8", ir.DataType.INT8), ("scale", linear.weight.dtype or ir.DataType.FLOAT16)):
        tensor = stored[f"{linear.weight.name}_{suffix}"]
        data = ir.ExternalTensor(tensor.file, tensor.offset, tensor.length, dtype, shape=ir.Shape(tensor.shape), name=tensor.name)
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype), const_value=data)
        graph.initializers.add(value)
        operands.append(value)
    output = ir.Value(name=f"{linear.name}.DequantizeLinear", shape=linear.weight.shape, type=linear.weight.type)
    module = {MODULE_KEY: linear.name}
    node = ir.Node("", "DequantizeLinear", operands, [ir.AttrInt64("axis", 0)], outputs=[output], name=output.name, metadata_props=module)
    graph.insert_before(linear.transpose, node)
    linear.transpose.replace_input_with(0, output)
    if not linear.weight.uses():
        del graph.initializers[str(linear.weight.name)]
