"""In what precision a graph computes: told by how its weight matrices are stored, and by the operators that read them.

The lowest decides: a graph with one linear in int4 is judged as int4. Float16 is told by weights, caches or logits in float16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from artifact.errors import FusionError
from graphs.foreign.ports import Ports

Kind = Literal["float32", "float16", "int8", "int8-smoothquant", "int4"]
WIDTHS = {
    ir.DataType.INT8: 8, ir.DataType.UINT8: 8, ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT2: 2, ir.DataType.UINT2: 2,
}  # fmt: skip
PACKED = {"MatMulNBits": 4, "GatherBlockQuantized": 4, "MatMulBnb4": 4, "DequantizeLinear": 0}
"""Operators that read quantised weights, and the width that they have where no attribute says another; 0: the dtype's."""
BOTH = frozenset({"MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm"})
"""Operators whose activations are integers too."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
NAMES = {ir.DataType.FLOAT: "float32"}
MATRIX_RANK = 2


@dataclass(frozen=True)
class Precision:
    """What judges a graph.

    Attributes:
        kind: rows of the table of limits.
        activations: dtype of caches and logits, float16 if either is: whether there are roundings to measure.
        found: how it was told, for the report.
    """

    kind: Kind
    activations: Literal["float16", "float32"]
    found: str


def read_precision(model: ir.Model, ports: Ports) -> Precision:
    """The precision of an opened graph.

    Raises:
        FusionError: bfloat16 or float64 weights, caches or logits: they have no limits and no kernels here.
    """
    matrices = [value for value in model.graph.initializers.values() if value.const_value is not None and len(value.const_value.shape) >= MATRIX_RANK]
    stored = Counter(value.const_value.dtype for value in matrices if value.const_value is not None and value.const_value.dtype.is_floating_point())
    edges = Counter(port.dtype for port in (*ports.past, ports.logits, *ports.present))
    for dtype in (*edges, *stored):
        if dtype not in FLOATS:
            raise FusionError(f"{dtype.name.lower()} is not judged here: weight matrices are {_counted(stored)}, caches and logits {_counted(edges)}")
    activations: Literal["float16", "float32"] = "float16" if ir.DataType.FLOAT16 in edges or _computes_float16(model) else "float32"
    told = f"caches and logits are {_counted(edges)}, weight matrices {_counted(stored) if stored else 'none'}"
    quantised = Counter(_quantised(model))
    if quantised:
        (kind, _), *_ = sorted(quantised, key=lambda found: found[0] != "int4")
        operators = ", ".join(f"{count} × {operator} {name}" for (name, operator), count in quantised.items())
        return Precision(kind, activations, f"{operators}; {told}")
    return Precision("float16" if ir.DataType.FLOAT16 in stored or activations == "float16" else "float32", activations, told)


def _computes_float16(model: ir.Model) -> bool:
    """Whether a matrix product reads a float16 weight."""
    weights = (value for node in model.graph if node.op_type in ("MatMul", "Gemm") for value in node.inputs if value is not None)
    return any(value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT16 for value in weights)


def _quantised(model: ir.Model) -> Iterator[tuple[Kind, str]]:
    """(kind, operator) of every operator that reads quantised weights."""
    for node in model.graph:
        if node.op_type in BOTH:
            yield "int8-smoothquant", node.op_type
        elif node.op_type in PACKED and (width := _width(node)) is not None:
            yield ("int8" if width == WIDTHS[ir.DataType.INT8] else "int4"), node.op_type


def _width(node: ir.Node) -> int | None:
    """Bits of a weight that a node dequantises; None where what it dequantises is no weight matrix."""
    weight = next((value for value in node.inputs[:2] if value is not None and value.const_value is not None), None)
    if weight is None or weight.const_value is None or weight.const_value.dtype not in WIDTHS:
        return None
    if node.op_type != "DequantizeLinear":
        return node.attributes.get_int("bits", PACKED[node.op_type])
    return WIDTHS[weight.const_value.dtype] if len(weight.const_value.shape) >= MATRIX_RANK else None


def _counted(dtypes: Counter[ir.DataType]) -> str:
    return ", ".join(f"{count} {NAMES.get(dtype, dtype.name.lower())}" for dtype, count in dtypes.items()) or "none"
