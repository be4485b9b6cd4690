"""A cut of a graph in float32: what it computes without rounding, so that a fault of 1e-4 is no longer below float16's own noise.

Inputs, constants and casts that are float16 become float32; a weight is converted when it is read. A pair that rounds an activation to int8 is
bypassed: what it takes away is a rounding, and no arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from validation.node_runner import load_constant

Kept = dict[str, NDArray[Any]]
"""Constants in float32, by name."""
MAKES_A_WEIGHT = ("Transpose", "DequantizeLinear")
TYPED = ("to", "output_dtype", "dtype")
"""Attributes that hold a dtype."""


def in_float32(cut: ir.Model, kept: Kept | None = None) -> ir.Model:
    """A copy of a cut whose every float16 is float32; external data is still read from where it lies, and once where there is a place to keep it.

    That place is not the graph: its nodes and values refer to each other, so it would keep gigabytes until the garbage collector comes by.
    """
    copy = cut.clone()
    graph = copy.graph
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.dtype == ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT16 or (value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16):
            _promote(value, kept)
    for node in list(graph):
        for name in TYPED:
            if name in node.attributes and node.attributes[name].value == ir.DataType.FLOAT16:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        _bypass(node)
        if _casts_a_weight(node) and (weight := node.inputs[0]) is not None:
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)  # it would be one copy more of the largest weight
    return copy


def _promote(value: ir.Value, kept: Kept | None) -> None:
    stored = ir.Value(name=value.name, const_value=value.const_value)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    if stored.const_value is not None:
        shape = ir.Shape(stored.const_value.shape.numpy())
        value.const_value = ir.LazyTensor(partial(_as_float32, stored, kept), ir.DataType.FLOAT, shape, name=value.name)


def _as_float32(stored: ir.Value, kept: Kept | None) -> ir.TensorProtocol:
    name = str(stored.name)
    array = kept[name] if kept is not None and name in kept else load_constant(stored).astype(np.float32)
    if kept is not None:
        kept[name] = array
    return ir.tensor(array, name=name)


def _casts_a_weight(node: ir.Node) -> bool:
    """Whether a node makes a float32 of a weight that is one by now, turned and dequantised or not."""
    value = node.inputs[0] if node.op_type == "Cast" else None
    if (
        value is None
        or value.dtype != ir.DataType.FLOAT
        or node.attributes.get_int("to", 0) != ir.DataType.FLOAT
        or node.outputs[0].is_graph_output()
    ):
        return False
    while value is not None and (made_by := value.producer()) is not None and made_by.op_type in MAKES_A_WEIGHT:
        value = made_by.inputs[0]
    return value is not None and value.is_initializer()


def _bypass(node: ir.Node) -> None:
    """Let what reads a rounded activation read the activation."""
    rounded = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    quantize = rounded.producer() if rounded is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear" or (activation := quantize.inputs[0]) is None:
        return
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, activation)
