"""The weights of a graph that is to be built: which linears it has, and where their bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.io_spec import present_layer

PASSED_THROUGH = ("Transpose", "DequantizeLinear", "Cast", "Identity")
"""Operators between a stored weight and the linear that uses it."""


@dataclass(frozen=True)
class Weight:
    """A stored weight, or the bias of a linear, and the nodes that use it.

    Attributes:
        name: of the initializer.
        tensor: its bytes, mapped.
        linears: names of the MatMul and Gemm nodes, as TensorRT prints them; empty for an embedding alone, and for a bias.
        quantized: int8 or int4 with scales.
        integer: the linears' input is int8 with a scale too, so that levels are multiplied.
    """

    name: str
    tensor: ir.TensorProtocol
    linears: tuple[str, ...]
    quantized: bool
    integer: bool = False

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return prod(self.tensor.shape.numpy())

    def stored(self) -> NDArray[Any]:
        """Its numbers as they lie in the file: of four bits two in a byte, rows apart."""
        if self.tensor.dtype == ir.DataType.INT4:
            return np.frombuffer(self.tensor.tobytes(), np.uint8).reshape(self.tensor.shape.numpy()[0], -1)
        return self.tensor.numpy()


def node_label(node: ir.Node) -> str:
    """A node's name as TensorRT prints it."""
    return node.name or f"node_of_{node.outputs[0].name}"


def weights_bytes(graph: ir.Graph) -> int:
    """Bytes of all weights; a tied one counts once."""
    return sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)


def layers_in(graph: ir.Graph) -> list[int]:
    """The decoder layers that a graph holds, by the caches it gives: all of a model, or those of a part."""
    return sorted({layer for value in graph.outputs if (layer := present_layer(str(value.name))) is not None})


def turned_bytes(graph: ir.Graph) -> int:
    """Bytes of the quantised weights that lie as [out, in] and are turned in the graph."""
    turned = {}
    for node in graph:
        if node.op_type == "DequantizeLinear" and any(user.op_type == "Transpose" for user, _ in node.outputs[0].uses()):
            levels = node.inputs[0].const_value if node.inputs[0] is not None else None
            if levels is not None:
                turned[node.inputs[0]] = levels.nbytes
    return sum(turned.values())


def find_weights(graph: ir.Graph) -> list[Weight]:
    """The two-dimensional weights that linears and the embedding use, in graph order; a tied one once."""
    found: dict[str, tuple[list[str], bool, bool]] = {}
    for node in graph:
        for position in _weight_inputs(node):
            source, quantized = _stored(node.inputs[position])
            if source is None or source.name is None:
                continue
            linears, *_ = found.setdefault(source.name, ([], quantized, quantized and _is_rounded(node.inputs[1 - position])))
            if node.op_type != "Gather":
                linears.append(node_label(node))
    weights = []
    for name, (linears, quantized, integer) in found.items():
        tensor = graph.initializers[name].const_value
        if tensor is not None and len(tensor.shape) == 2:
            weights.append(Weight(name, tensor, tuple(linears), quantized, integer))
    return weights


def _is_rounded(value: ir.Value | None) -> bool:
    """Whether a value is what DequantizeLinear makes of a rounded one."""
    node = value.producer() if value is not None else None
    before = node.inputs[0].producer() if node is not None and node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    return before is not None and before.op_type == "QuantizeLinear"


def find_biases(graph: ir.Graph) -> list[Weight]:
    """The stored vectors that are added to what a linear gives, in graph order; one of zeros is left out, for a compiler may leave it out."""
    found = []
    for node in graph:
        operands = [value for value in node.inputs if value is not None] if node.op_type == "Add" else []
        if any(_is_of_linear(value) for value in operands):
            stored = [(str(value.name), value.const_value) for value in operands if value.is_initializer()]
            found += [Weight(name, tensor, (), quantized=False) for name, tensor in stored if tensor is not None and len(tensor.shape) == 1]
    return [bias for bias in found if bias.tensor.numpy().any()]


def _is_of_linear(value: ir.Value) -> bool:
    """Whether a value is a linear's result, cast or not."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in ("MatMul", "Gemm")


def _weight_inputs(node: ir.Node) -> tuple[int, ...]:
    """Where a node takes a weight; a table that positions are looked up in is none."""
    if node.op_type in ("MatMul", "Gemm"):
        return (0, 1)
    is_embedding = node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids"
    return (0,) if is_embedding else ()


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The initializer behind a value, and whether it is dequantised on the way; (None, False) if it is computed."""
    quantized = False
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in PASSED_THROUGH:
            return None, False
        quantized |= node.op_type == "DequantizeLinear"
        value = node.inputs[0]
    return value, quantized
