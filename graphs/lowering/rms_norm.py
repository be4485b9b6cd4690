"""Write ``RMSNormalization`` in primitive operators, with float32 inside.

Before:  x ─ RMSNormalization(weight, axis=-1, epsilon, stash_type=FLOAT)
After:   x ─ Cast(float32)? ─ Pow(2) ─ ReduceMean(-1) ─ Add(eps) ─ Sqrt ─ Reciprocal ─ Mul(x) ─ Cast(dtype of x)? ─ Mul(weight)
Source:  https://onnx.ai/onnx/operators/onnx__RMSNormalization.html
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.fusions._reading import Tape
from graphs.fusions._values import is_last_axis, sizes
from graphs.lowering._parts import refuse

OPERATOR = "RMSNormalization"
LAST_AXIS, FLOAT = -1, ir.DataType.FLOAT


def lower(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node.

    Raises:
        FusionError: another axis or stash type than those of our rules, or a weight of another dtype.
    """
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    if not is_last_axis(node.attributes.get_int("axis", LAST_AXIS), x) or node.attributes.get_int("stash_type", int(FLOAT)) != int(FLOAT):
        raise refuse(node, "it is not over the last axis, in float32")
    if x.dtype != weight.dtype and None not in (x.dtype, weight.dtype):
        raise refuse(node, f"the weight is {weight.dtype}, the input {x.dtype}")
    dtype, shape = x.dtype or weight.dtype, sizes(x)
    mean_shape = None if shape is None else (*shape[:-1], 1)
    tape = Tape(graph, node.outputs[0])
    x32 = x if dtype == FLOAT else tape.add("Cast", x, dtype=FLOAT, shape=shape, to=int(FLOAT))
    squares = tape.add("Pow", x32, tape.constant(2.0, FLOAT), dtype=FLOAT, shape=shape)
    mean = tape.add("ReduceMean", squares, [LAST_AXIS], dtype=FLOAT, shape=mean_shape, keepdims=1)
    shifted = tape.add("Add", mean, tape.constant(node.attributes.get_float("epsilon", 1e-5), FLOAT), dtype=FLOAT, shape=mean_shape)
    inverse = tape.add("Reciprocal", tape.add("Sqrt", shifted, dtype=FLOAT, shape=mean_shape), dtype=FLOAT, shape=mean_shape)
    normed = tape.add("Mul", x32, inverse, dtype=FLOAT, shape=shape)
    if dtype is not None and dtype != FLOAT:
        normed = tape.add("Cast", normed, dtype=dtype, shape=shape, to=int(dtype))
    tape.add("Mul", weight, normed, dtype=dtype, shape=shape)
    tape.finish()
