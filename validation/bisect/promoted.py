"""A cut of a graph in float32: what it computes without rounding, so that a fault of 1e-4 is no longer below float16's own noise.

Inputs, constants and casts that are float16 become float32; a weight is converted when it is read. A pair that rounds an activation to int8 is
bypassed: what it takes away is a rounding, and no arithmetic.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from validation.node_runner import load_constant

TYPED = ("to", "output_dtype", "dtype")
"""Attributes that hold a dtype."""


def in_float32(cut: ir.Model, *, keep: bool = False) -> ir.Model:
    """A copy of a cut whose every float16 is float32; external data is still read from where it lies, once where it is to be kept."""
    copy = cut.clone()
    graph = copy.graph
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 or (value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16):
            _promote(value, keep)
    for node in list(graph):
        for name in TYPED:
            if name in node.attributes and node.attributes[name].value == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        _bypass(node)
    return copy


def _promote(value: ir.Value, keep: bool) -> None:
    stored = ir.Value(name=value.name, const_value=value.const_value)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if stored.const_value is not None:
        shape = ir.Shape(stored.const_value.shape.numpy())
        value.const_value = ir.LazyTensor(partial(_as_float32, stored), ir.DataType.FLOAT, shape, name=value.name, cache=keep)


def _as_float32(stored: ir.Value) -> ir.TensorProtocol:
    return ir.tensor(load_constant(stored).astype(np.float32), name=stored.name)


def _bypass(node: ir.Node) -> None:
    """Let what reads a rounded activation read the activation."""
    rounded = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    quantize = rounded.producer() if rounded is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear" or (activation := quantize.inputs[0]) is None:
        return
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, activation)
