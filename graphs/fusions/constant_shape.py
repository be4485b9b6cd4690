"""Make the shape of a Reshape constant where it only passes dynamic axes on.

Before:  x [B, S, …] ─ Reshape(Concat(Shape(B), Shape(S), 9, 64), allowzero=1)
After:   x ─ Reshape([0, 0, 9, 64])          0 = this axis stays as it is
Source:  https://onnx.ai/onnx/operators/onnx__Reshape.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import axis_read, in_module, module_of, numbers, producer, shape_constant, sizes

KEEP = 0


class FuseConstantShape(FusionRule):
    """Rules: 1. a dynamic size is that of the same axis of the input; 2. every other size is a constant."""

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        """The sizes are read in ``objections``: their number varies."""
        return op.Reshape(x, shape, _outputs=["reshaped"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """What a constant can't say, and shapes that are constant already."""
        x, shape = matched["x"], matched["shape"]
        parts = _concatenated(shape)
        if not parts:
            yield "the shape is not joined from single sizes", shape
        for axis, part in enumerate(parts):
            constant = numbers(part)
            if constant is not None and (len(constant) != 1 or constant[0] == KEEP):
                yield "a constant part of the shape is 0, or not a single size", part
            if constant is None and not _keeps_axis(x, axis, part):
                yield f"size {axis} of the shape is neither constant nor the size of axis {axis} of the input", part

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value, reshaped: ir.Value) -> ir.Value:
        """The same Reshape, with a constant in which 0 means the input's own size."""
        constants = [numbers(part) for part in _concatenated(shape)]
        target = [KEEP if constant is None else int(constant[0]) for constant in constants]
        return in_module(op.Reshape(x, shape_constant(op, f"{reshaped.name}.shape", target)), module_of(reshaped))


def _concatenated(shape: ir.Value) -> list[ir.Value]:
    concat = producer(shape, "Concat")
    return [] if concat is None else [value for value in concat.inputs if value is not None]


def _keeps_axis(x: ir.Value, axis: int, part: ir.Value) -> bool:
    """Whether a computed size is that of this axis of x: the same named axis, read from any value."""
    read, wanted = axis_read(part), (sizes(x) or ())[axis : axis + 1]
    return read is not None and wanted == (read,)


def is_candidate(node: ir.Node) -> bool:
    """Every Reshape whose shape is computed."""
    return node.op_type == "Reshape" and producer(node.inputs[1], "Concat") is not None


RULES = RewriteRuleSet([FuseConstantShape.rule()])
