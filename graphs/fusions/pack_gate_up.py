"""Pack the gate and up projections of a SwiGLU into one linear.

Before:  x ─ MatMul(Transpose(gate [F, E])) ─ g;  x ─ MatMul(Transpose(up [F, E])) ─ u;  Mul(Mul(g, Sigmoid(g)), u)
After:   x ─ MatMul(Transpose(gate_up [2F, E])) ─ Reshape [0, 0, 2, F] ─ Split(axis=2) ─ Squeeze ─ g, u;  Mul(Mul(g, Sigmoid(g)), u)
         With biases [F] each MatMul is followed by an Add before, and the packed one by an Add of [2F] after.
Source:  SwiGLU, arXiv:2002.05202; the new axis: graphs/fusions/_packing.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions._packing import TURNED, packed_linear, packing_objections
from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import in_module, module_of, producer, shape_constant, sizes

PACKED_NAME = "mlp.gate_up_proj"
NEW_AXIS = 2


class PackGateUp(FusionRule):
    """Rules: 1. both weights lie next to each other, gate first, and so do biases; 2. both are [F, E]."""

    def pattern(self, op: Any, x: Any, gate_weight: Any, up_weight: Any) -> Any:
        """Every form of the operands' order comes from ``commute``."""
        gate = op.MatMul(x, op.Transpose(gate_weight, perm=TURNED))
        up = op.MatMul(x, op.Transpose(up_weight, perm=TURNED))
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up, _outputs=["product"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """Weights that are not one."""
        gate_weight, up_weight = matched["gate_weight"], matched["up_weight"]
        yield from packing_objections(matched["x"], (gate_weight, up_weight), PACKED_NAME, _biases(matched))
        if sizes(gate_weight) != sizes(up_weight):
            yield "gate and up are not of one shape", up_weight

    def rewrite(self, op: Any, **matched: ir.Value) -> ir.Value:
        """The packed linear, its two halves and the activation."""
        x, product = matched["x"], matched["product"]
        module, dtype, shape = module_of(product), x.dtype, sizes(product)
        assert shape is not None
        both = packed_linear(op, x, (matched["gate_weight"], matched["up_weight"]), PACKED_NAME, _biases(matched))  # [B, S, 2F]
        gate, up = (in_module(half, module, dtype, shape) for half in self.halves(op, both, product))
        sigmoid = in_module(op.Sigmoid(gate), module, dtype, shape)
        return in_module(op.Mul(in_module(op.Mul(gate, sigmoid), module, dtype, shape), up), module)

    def halves(self, op: Any, both: ir.Value, product: ir.Value) -> list[ir.Value]:
        """Gate and up [B, S, F] of ``both`` [B, S, 2F], by a new axis."""
        module, dtype, shape = module_of(product), both.dtype, sizes(product)
        assert shape is not None
        assert isinstance(shape[-1], int)
        pairs_shape, half_shape = (*shape[:NEW_AXIS], 2, *shape[NEW_AXIS:]), (*shape[:NEW_AXIS], 1, *shape[NEW_AXIS:])
        target = shape_constant(op, f"{product.name}.pairs", [0, 0, 2, shape[-1]])
        pairs = in_module(op.Reshape(both, target), module, dtype, pairs_shape)  # [B, S, 2, F]
        parts = op.Split(pairs, shape_constant(op, f"{product.name}.halves", [1, 1]), axis=NEW_AXIS, _outputs=2)
        axes = shape_constant(op, f"{product.name}.axis", [NEW_AXIS])
        return [op.Squeeze(in_module(part, module, dtype, half_shape), axes) for part in parts]


class PackBiasedGateUp(PackGateUp):
    """The same with a bias on both."""

    def pattern(self, op: Any, x: Any, gate_weight: Any, up_weight: Any, gate_bias: Any, up_bias: Any) -> Any:  # type: ignore[override]
        """The library reads the variables' names from the signature."""
        gate = op.Add(op.MatMul(x, op.Transpose(gate_weight, perm=TURNED)), gate_bias)
        up = op.Add(op.MatMul(x, op.Transpose(up_weight, perm=TURNED)), up_bias)
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up, _outputs=["product"])


def _biases(matched: dict[str, ir.Value]) -> tuple[ir.Value, ...]:
    return tuple(matched[name] for name in ("gate_bias", "up_bias") if name in matched)


def is_candidate(node: ir.Node) -> bool:
    """Every Sigmoid of a linear's output, with a bias or without, could be a SwiGLU's."""
    value = node.inputs[0] if node.op_type == "Sigmoid" else None
    biased = producer(value, "Add")
    return any(producer(linear, "MatMul") is not None for linear in (biased.inputs if biased is not None else (value,)))


RULES = RewriteRuleSet([PackGateUp.rule(), PackBiasedGateUp.rule()], commute=True)
