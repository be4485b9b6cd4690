"""Fuse decomposed RMSNorm into one ``RMSNormalization`` node (ONNX opset 23).

Before:  x ─ Cast(float32)? ─ Pow(2) ─ ReduceMean(-1) ─ Add(eps) ─ Sqrt ─ Reciprocal ─ Mul(x) ─ Cast(dtype of x)? ─ Mul(weight)
After:   x ─ RMSNormalization(weight, axis=-1, epsilon=eps, stash_type=FLOAT)
Source:  https://onnx.ai/onnx/operators/onnx__RMSNormalization.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import cast_to, in_module, is_last_axis, last_size, module_of, node_of, numbers, rank, scalar


class FuseRMSNorm(FusionRule):
    """Rules: 1. the statistics are float32, over the last axis; 2. the result is rounded to the dtype of x before the weight is applied.

    Args:
        upcast: match the form of float16 graphs, with a cast to float32 before and one back after.
    """

    def __init__(self, *, upcast: bool) -> None:
        super().__init__(name=f"rms_norm, upcast={upcast}")
        self.upcast = upcast

    def pattern(self, op: Any, x: Any, weight: Any, exponent: Any, axes: Any, epsilon: Any) -> Any:
        """Every form of the operands' order comes from ``commute``."""
        x32 = op.Cast(x, _outputs=["x32"]) if self.upcast else x
        mean = op.ReduceMean(op.Pow(x32, exponent), axes, _outputs=["mean"])
        normed = op.Mul(x32, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        if self.upcast:
            normed = op.Cast(normed, _outputs=["rounded"])
        return op.Mul(weight, normed, _outputs=["scaled"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """What RMSNormalization would compute differently."""
        yield from self._number_objections(**matched)
        yield from self._axis_objections(**matched)
        yield from self._precision_objections(**matched)

    def _number_objections(self, exponent: ir.Value, epsilon: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        if scalar(exponent) != 2:
            yield "the values are not squared: the exponent is not the constant 2", exponent
        if scalar(epsilon) is None:
            yield "epsilon is not a constant number", epsilon

    def _axis_objections(self, x: ir.Value, weight: ir.Value, axes: ir.Value, mean: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        reduced = numbers(axes)
        if reduced is None or len(reduced) != 1 or not is_last_axis(reduced[0], x):
            yield "the mean is not taken over the last axis", axes
        if node_of(mean).attributes.get_int("keepdims", 1) != 1:
            yield "the mean drops its axis (keepdims=0)", mean
        if rank(weight) != 1 or last_size(weight) != last_size(x):
            yield "the weight is not a vector over the last axis", weight

    def _precision_objections(self, x: ir.Value, x32: ir.Value | None = None, rounded: ir.Value | None = None, **_: ir.Value) -> Iterator[Objection]:
        if not self.upcast and x.dtype != ir.DataType.FLOAT:
            yield f"it computes in {x.dtype} without a cast to FLOAT; RMSNormalization computes in FLOAT and would change the numbers", x
        if x32 is not None and cast_to(x32) != ir.DataType.FLOAT:
            yield f"it computes in {cast_to(x32)}, not in FLOAT", x32
        if rounded is not None and cast_to(rounded) != x.dtype:
            yield f"the result is cast to {cast_to(rounded)}, the input is {x.dtype}", rounded

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value, scaled: ir.Value, **_: ir.Value) -> ir.Value:
        """One node in the place of the last multiplication."""
        stash_type = int(ir.DataType.FLOAT)
        return in_module(op.RMSNormalization(x, weight, axis=-1, epsilon=scalar(epsilon), stash_type=stash_type), module_of(scaled))


def is_candidate(node: ir.Node) -> bool:
    """Every mean over the last axis could be a norm's."""
    return node.op_type == "ReduceMean"


RULES = RewriteRuleSet([FuseRMSNorm.rule(upcast=True), FuseRMSNorm.rule(upcast=False)], commute=True)
