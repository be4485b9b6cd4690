"""Let a float16 linear add up in float32: TensorRT takes the dtype of a MatMul for the dtype of its sums.

Before:  x ─ MatMul(weight) ─ y                                          float16 throughout
After:   x ─ Cast(FLOAT) ─ MatMul(Cast(weight, FLOAT)) ─ Cast(FLOAT16) ─ y
         Gemm alike; the weight may be transposed or dequantised on its way, and is stored as before.

TensorRT makes one kernel of it, which reads the float16 (or int8) bytes: same kernels, same plan size, ``accumulation_type`` 2 instead of 0.
Run on a GPU, float16 sums cost a prefill of SmolLM2 two to five times the error of all other float16 arithmetic: docs/gpu-results.md.
Products of two computed operands (attention's) are left alone.
Source:  https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/accuracy-considerations.html
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._values import in_module, module_of, sizes

LINEARS = ("MatMul", "Gemm")
ON_THE_WAY = {"Transpose": 0, "Identity": 0, "Cast": 0, "DequantizeLinear": 1}
"""Operators between a stored weight and its linear → the input whose dtype they keep; a Cast has its own."""


@dataclass(frozen=True)
class HalfLinear:
    """A linear of float16 operands."""

    linear: ir.Node


def is_candidate(node: ir.Node) -> bool:
    """Every product by a stored float16 weight."""
    return node.op_type in LINEARS and node.domain == "" and any(stored_dtype(value) == ir.DataType.FLOAT16 for value in node.inputs[:2])


def stored_dtype(value: ir.Value | None) -> ir.DataType | None:
    """The dtype in which a stored weight comes to its linear; None for what is computed from an input."""
    if value is None:
        return None
    if value.is_initializer():
        return value.dtype
    node = value.producer()
    if node is None or node.op_type not in ON_THE_WAY or node.domain != "":
        return None
    made = stored_dtype(node.inputs[ON_THE_WAY[node.op_type]])
    return ir.DataType(node.attributes.get_int("to")) if node.op_type == "Cast" and made is not None else made


def read(node: ir.Node) -> HalfLinear:
    """Nothing stands against it: the result is the exact product rounded once, where it was rounded at every sum."""
    return HalfLinear(node)


def rewrite(graph: ir.Graph, found: HalfLinear) -> None:
    """Casts around the same linear, which keeps its name; the result keeps that of the product."""
    linear, product = found.linear, found.linear.outputs[0]
    for position, value in enumerate(linear.inputs):
        if value is not None:
            wide = _cast(value, ir.DataType.FLOAT, f"{linear.name}.operand_{position}", linear)
            graph.insert_before(linear, wide)
            linear.replace_input_with(position, wide.outputs[0])
    narrow = _cast(product, ir.DataType.FLOAT16, f"{linear.name}.half", linear)
    graph.insert_after(linear, narrow)
    half = narrow.outputs[0]
    ir.convenience.replace_all_uses_with([product], [half], replace_graph_outputs=True)
    narrow.replace_input_with(0, product)
    half.name, product.name = product.name, f"{product.name}.sum"
    product.type = ir.TensorType(ir.DataType.FLOAT)


def _cast(value: ir.Value, dtype: ir.DataType, name: str, linear: ir.Node) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    in_module(node.outputs[0], module_of(linear.outputs[0]), dtype, sizes(value))
    node.outputs[0].name = name
    return node
