"""Pack the gate and up projections of a SwiGLU into one linear, for ONNX Runtime: it is sliced on its last axis.

Before:  x ─ MatMul(Transpose(gate [F, E])) ─ g;  x ─ MatMul(Transpose(up [F, E])) ─ u;  Mul(Mul(g, Sigmoid(g)), u)
After:   x ─ MatMul(Transpose(gate_up [2F, E])) ─ Split(axis=2) ─ g, u;  Mul(Mul(g, Sigmoid(g)), u)
         With biases [F] each MatMul is followed by an Add before, and the packed one by an Add of [2F] after.

ONNX Runtime stores a packed weight once however it is split, unlike TensorRT (_packing.py), and each product of one row costs it a start of its own.
Source:  docs/adr/012
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions import pack_gate_up
from graphs.fusions._values import last_size, shape_constant

LAST_AXIS = 2


class PackSlicedGateUp(pack_gate_up.PackGateUp):
    """Rules: as PackGateUp's."""

    def halves(self, op: Any, both: ir.Value, product: ir.Value) -> list[ir.Value]:
        """Gate and up [B, S, F] of ``both`` [B, S, 2F], by its last axis."""
        half = last_size(product)
        assert isinstance(half, int)
        parts: list[ir.Value] = op.Split(both, shape_constant(op, f"{product.name}.halves", [half, half]), axis=LAST_AXIS, _outputs=2)
        return parts


class PackSlicedBiasedGateUp(PackSlicedGateUp, pack_gate_up.PackBiasedGateUp):
    """The same with a bias on both."""


is_candidate = pack_gate_up.is_candidate
RULES = RewriteRuleSet([PackSlicedGateUp.rule(), PackSlicedBiasedGateUp.rule()], commute=True)
