"""The weights that a cut computes with, whatever form they are stored in, beside the checkpoint's.

A linear's weight is what its product multiplies by: constants alone make it (a transpose, a dequantisation, a cast), so it is computed from them.
Letters: E hidden, n values of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.layout import MODULE_KEY, members
from graphs.quantize.rounding import FACTORS, INT4, INT8, Format, Grid, largest_over
from validation.node_runner import load_constant, run_nodes

Array = NDArray[Any]
PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
LEVELS = {ir.DataType.INT8: INT8, ir.DataType.INT4: INT4}
FLOAT32 = np.dtype(np.float32)
BLOCK = 256
"""Rows of an identity that a packed product is asked with at a time."""


@dataclass(frozen=True)
class Weight:
    """A weight as a cut computes with it.

    Attributes:
        array: float32; of a linear [out, in].
        initializer: what it is stored as.
        node: the first that reads it.
        grid: the levels and scales that it was rounded to; None where it is stored as a float.
    """

    array: Array
    initializer: str
    node: ir.Node
    grid: Grid | None = None


def weights_of(cut: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Weight]:
    """Every weight of a cut that computes in float32 (``promoted``).

    Args:
        cut: of a layer, of what the layers share or of what follows them.
        shapes: weight's name as in the checkpoint → its shape; of more than the cut reads.
    """
    modules: dict[str, list[ir.Node]] = {}
    for node in cut.graph:
        modules.setdefault(node.metadata_props.get(MODULE_KEY, ""), []).append(node)
    found: dict[str, Weight] = {}
    for module, nodes in modules.items():
        if (product := next((node for node in nodes if node.op_type in PRODUCTS and _constant(node.inputs[1])), None)) is not None:
            found |= _split(_linear(cut, product), [f"{name}.weight" for name in members(module)], shapes)
            found |= _split(_vector(nodes, ".bias"), [f"{name}.bias" for name in members(module)], shapes)
        elif (vector := _vector(nodes, ".weight")) is not None and f"{module}.weight" in shapes:
            found[f"{module}.weight"] = vector
    return found


def stored_as(cut: ir.Model, names: Sequence[str]) -> Iterator[tuple[str, Weight]]:
    """Tables that a cut reads as they are: the embedding, the rotary tables."""
    for name in names:
        value = cut.graph.initializers.get(name)
        if value is not None and (users := value.uses()):
            yield name, Weight(load_constant(value), name, next(node for node in cut.graph if any(node is user for user, _ in users)))


def _split(weight: Weight | None, names: list[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, Weight]:
    """A packed weight's rows by member; nothing where it is none of the checkpoint's."""
    if weight is None or any(name not in shapes for name in names):
        return {}
    ends = np.cumsum([0, *(shapes[name][0] for name in names)])
    if ends[-1] != len(weight.array):
        return {}
    return {
        name: Weight(weight.array[start:end], weight.initializer, weight.node, weight.grid)
        for name, (start, end) in zip(names, pairwise(ends.tolist()), strict=True)
    }


def _linear(cut: ir.Model, product: ir.Node) -> Weight:
    operand = product.inputs[1]
    assert operand is not None
    if product.op_type == "MatMulNBits":
        form = Format(product.attributes.get_int("bits", 4), product.attributes.get_int("block_size", 32))
        return Weight(_asked(cut, product), str(operand.name), product, form.grid(FLOAT32))
    chain = _chain(operand)
    stored = next((value for value in chain if value.is_initializer()), operand)
    first = next((node for value in reversed(chain) if (node := value.producer()) is not None), product)
    turned = product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
    if (last := operand.producer()) is not None and last.op_type == "Transpose" and (before := last.inputs[0]) is not None:
        operand, turned = before, not turned  # a copy less of the largest weight
    array = run_nodes(_alone(cut, operand), {})[str(operand.name)] if operand.producer() is not None else load_constant(operand)
    rows = np.ascontiguousarray(array if turned else array.T, dtype=np.float32)
    return Weight(rows, str(stored.name), first, _grid(stored, first, rows.shape[1]))


def _grid(stored: ir.Value, first: ir.Node, columns: int) -> Grid | None:
    """What a constant that is dequantised by its first node was rounded to."""
    dtype = stored.const_value.dtype if stored.const_value is not None else None
    if dtype not in LEVELS:
        return None
    low, high = LEVELS[dtype]
    factors = FACTORS if dtype == ir.DataType.INT4 else ()
    return Grid(low, high, first.attributes.get_int("block_size", 0) or columns, largest_over(high, FLOAT32), factors)


def _asked(cut: ir.Model, product: ir.Node) -> Array:
    """The weight [out, in] of a product that holds it packed: what it makes of the rows of an identity, which no rounding of inputs changes."""
    size = product.attributes.get_int("K", 0)
    given = ir.Value(name="identity", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", size]))
    made = ir.Value(name="columns")
    operands = [ir.Value(name=value.name, const_value=value.const_value) if value is not None else None for value in product.inputs[1:]]
    node = ir.Node(product.domain, product.op_type, [given, *operands], product.attributes.values(), outputs=[made], version=product.version)
    graph = ir.Graph(
        [given], [made], nodes=[node], initializers=[value for value in operands if value is not None], opset_imports=cut.graph.opset_imports
    )
    model = ir.Model(graph, ir_version=cut.ir_version)
    blocks = [np.eye(size, dtype=np.float32)[start : start + BLOCK] for start in range(0, size, BLOCK)]
    return np.concatenate([run_nodes(model, {"identity": block})["columns"] for block in blocks]).T


def _alone(cut: ir.Model, value: ir.Value) -> ir.Model:
    return ir.Model(ir.convenience.extract(cut.graph, [], [value]), ir_version=cut.ir_version)


def _chain(value: ir.Value) -> list[ir.Value]:
    """The value and what it is computed from, always by the first input."""
    chain = [value]
    while (node := chain[-1].producer()) is not None and node.inputs and node.inputs[0] is not None:
        chain.append(node.inputs[0])
    return chain


def _constant(value: ir.Value | None) -> bool:
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(operand is None or _constant(operand) for operand in node.inputs)


def _vector(nodes: Sequence[ir.Node], suffix: str) -> Weight | None:
    """The one vector of a module: a norm's weight, a linear's bias."""
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT and _is_vector(value, suffix):
                return Weight(load_constant(value), str(value.name), node)
    return None


def _is_vector(value: ir.Value, suffix: str) -> bool:
    _, found, rest = str(value.name).rpartition(suffix)
    return bool(found) and "scale" not in rest and value.shape is not None and value.shape.rank() == 1
