"""INT8 × INT8 products: a float32-typed island around Q/DQ, one Q/DQ of an input for all linears that read it.

Before:  x ─ Cast(FLOAT) ─ MatMul(Cast(Transpose(weight float16 [out, in]), FLOAT)) ─ Cast(FLOAT16)
After:   x ─ Cast(FLOAT) ─ QuantizeLinear(scale) ─ DequantizeLinear(scale)
           ─ MatMul(Transpose(DequantizeLinear(weight_int8 [out, in], weight_scale float32 [out], axis=0))) ─ Cast(FLOAT16)
         A float32 graph has no casts and gets the same in between.

TensorRT makes of it a kernel that rounds the input to int8, a GEMM of int8 by int8 that adds up in int32, and the product of both scales in
float32. Typed float16, the sums would leave the GEMM in float16, which four products of full scale overflow, and small scales would be zero.
Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html; docs/adr/015
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.layout import MODULE_KEY
from artifact.tensor_file import StoredTensor
from graphs.fusions._values import cast_to
from graphs.quantize.int8 import FORM
from graphs.quantize.linears import Linear, site_of
from graphs.quantize.rounding import Levels
from graphs.quantize.weight_only import dequantize
from graphs.quantize.writer import SAFETENSORS, Piece, add_initializer, read_mapped, shape_of

ZERO_POINT = "int8_zero_point"
LOWEST, HIGHEST = -128, 127
"""What QuantizeLinear saturates to."""


class Islands:
    """Writes the islands of one graph; linears of one input share its Q/DQ.

    Args:
        graph: the fused graph, changed in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[ir.Value, ir.Value] = {}

    def put(self, linear: Linear, activation_scale: float, levels: ir.Value, weight_scale: ir.Value) -> None:
        """Make an island of one linear.

        Args:
            linear: a MatMul in float32, its operands cast or not; in topological order where several read one input.
            activation_scale: of its input, above zero; the first linear of an input decides.
            levels: initializer [out, in] int8.
            weight_scale: initializer [out] float32.

        Raises:
            QuantizationError: the linear adds up in float16, so it has no island to stand in.
        """
        wide = linear.matmul.inputs[0]
        assert wide is not None
        check_float32_sums(linear)
        rounded = self._rounded_input(linear, wide, activation_scale)
        weight = self._dequantized(linear, levels, weight_scale)
        linear.transpose.replace_input_with(0, weight)
        linear.transpose.outputs[0].type = weight.type
        unused = [value.producer() for value in linear.matmul.inputs if value is not None and cast_to(value) is not None]
        linear.matmul.replace_input_with(0, rounded)
        linear.matmul.replace_input_with(1, linear.transpose.outputs[0])
        self._graph.remove([node for node in unused if node is not None and not node.outputs[0].uses()], safe=True)
        if not linear.weight.uses():
            del self._graph.initializers[str(linear.weight.name)]

    def _rounded_input(self, linear: Linear, wide: ir.Value, scale: float) -> ir.Value:
        """The dequantised input [B, S, in] float32, made by the first linear that asks."""
        cast = wide.producer() if cast_to(wide) is not None else None
        source = cast.inputs[0] if cast is not None else wide
        assert source is not None
        if source not in self._rounded:
            site = site_of(linear.name)
            step = self._constant(f"{site}.activation_scale", np.float32(scale))
            zero = self._graph.initializers.get(ZERO_POINT) or self._constant(ZERO_POINT, np.int8(0))
            quantize = self._node("QuantizeLinear", [wide, step, zero], f"{site}.QuantizeLinear", linear)
            dequantize = self._node("DequantizeLinear", [quantize.outputs[0], step, zero], f"{site}.input_DequantizeLinear", linear)
            for node, dtype in ((quantize, ir.DataType.INT8), (dequantize, ir.DataType.FLOAT)):
                node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), wide.shape
            self._graph.insert_before(linear.matmul, [quantize, dequantize])
            self._rounded[source] = dequantize.outputs[0]
        return self._rounded[source]

    def _dequantized(self, linear: Linear, levels: ir.Value, weight_scale: ir.Value) -> ir.Value:
        """The weight [out, in] float32."""
        node = self._node("DequantizeLinear", [levels, weight_scale], f"{linear.name}.DequantizeLinear", linear)
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), levels.shape
        self._graph.insert_before(linear.transpose, node)
        return node.outputs[0]

    def _node(self, op_type: str, inputs: list[ir.Value], name: str, linear: Linear) -> ir.Node:
        module = linear.matmul.metadata_props.get(MODULE_KEY, linear.name)
        return ir.Node("", op_type, inputs, outputs=[ir.Value(name=name)], name=name, metadata_props={MODULE_KEY: module})

    def _constant(self, name: str, number: np.generic) -> ir.Value:
        tensor = ir.tensor(np.asarray(number), name=name)
        value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.initializers.add(value)
        return value


def check_float32_sums(linear: Linear) -> None:
    """Refuse a linear that has no island to stand in.

    Raises:
        QuantizationError: it adds up in float16.
    """
    wide = linear.matmul.inputs[0]
    if linear.weight.dtype != ir.DataType.FLOAT and (wide is None or cast_to(wide) != ir.DataType.FLOAT):
        raise QuantizationError(f"{linear.name} adds up in float16, which int8 by int8 overflows", hint="python cli.py fuse ART --force")


def island_piece(
    linear: Linear, folder: Path, rounded: Callable[[NDArray[Any], np.dtype[Any]], tuple[Levels, NDArray[Any]]], *, whole: bool
) -> Piece:
    """Levels and scales [out] of one linear as ``put_islands`` reads them.

    Args:
        linear: whose weight is read when the piece is made.
        folder: of the weights.
        rounded: weight [out, in] and the dtype of its scales → levels [out, in] and scales [out] or [out, 1].
        whole: an island: levels [out, in] and float32 scales; else weight-only INT8's.
    """
    rows, columns = shape_of(linear.weight)
    dtype = ir.DataType.FLOAT if whole else linear.weight.dtype or ir.DataType.FLOAT16
    shape = (rows, columns) if whole else (columns, rows)

    def make() -> Iterator[NDArray[Any]]:
        levels, scale = read_mapped(linear.weight, folder, lambda weight: rounded(weight, dtype.numpy()))
        yield from (levels,) if whole else FORM.stored(levels)
        yield scale.reshape(rows).astype(dtype.numpy())

    name = f"{linear.name}.weight_int8" if whole else FORM.levels_name(linear)
    return Piece(linear.name, {name: ("I8", shape), f"{linear.name}.weight_scale": (SAFETENSORS[dtype], (rows,))}, make)


def put_islands(graph: ir.Graph, linears: Iterable[Linear], scales: Mapping[str, float], stored: Mapping[str, StoredTensor]) -> None:
    """An island for every linear whose name has an activation scale; the others become weight-only INT8. Levels and scales are stored already."""
    islands = Islands(graph)
    for linear in linears:
        if linear.name not in scales:
            dequantize(graph, linear, FORM, shape_of(linear.weight)[1], stored)
            continue
        dtypes = {"int8": ir.DataType.INT8, "scale": ir.DataType.FLOAT}
        levels, scale = (add_initializer(graph, stored[f"{linear.name}.weight_{part}"], dtype) for part, dtype in dtypes.items())
        islands.put(linear, scales[linear.name], levels, scale)
