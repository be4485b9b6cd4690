"""Make the shape of a Reshape constant where it only passes batch and sequence on, however the shape is computed.

Before:  x [B, S, …] ─ Reshape(Concat(Gather(Shape(y)), …, 9, 64))
After:   x ─ Reshape([0, 0, 9, 64])          0 = this axis stays as it is

The sizes are those that were measured (graphs/foreign/measure.py), so that the arithmetic need not be understood.
Source:  https://onnx.ai/onnx/operators/onnx__Reshape.html
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._reading import Refused, Tape
from graphs.fusions._values import sizes

KEEP = 0


@dataclass(frozen=True)
class ConstantShape:
    """``x`` reshaped to ``target``, in which 0 is the input's own size."""

    x: ir.Value
    target: tuple[int, ...]
    reshaped: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every Reshape of [B, S, …] to [B, S, …] whose shape is computed."""
    if node.op_type != "Reshape":
        return False
    target = node.inputs[1]
    assert target is not None
    if target.const_value is not None:
        return False
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    return before is not None and after is not None and len(before) > 2 and before[:2] == after[:2]


def read(node: ir.Node) -> ConstantShape:
    """The constant shape of a Reshape; raises Refused."""
    x, after = node.inputs[0], sizes(node.outputs[0])
    before = sizes(x)
    assert x is not None
    assert before is not None
    assert after is not None
    for axis, size in enumerate(after):
        if not isinstance(size, int) and (size is None or before[axis : axis + 1] != (size,)):
            raise Refused(f"size {axis} of the shape is neither constant nor the size of axis {axis} of the input")
    return ConstantShape(x, tuple(size if isinstance(size, int) else KEEP for size in after), node.outputs[0])


def rewrite(graph: ir.Graph, found: ConstantShape) -> None:
    """The same Reshape with a constant shape."""
    tape = Tape(graph, found.reshaped)
    tape.add("Reshape", found.x, found.target)
    tape.finish()
