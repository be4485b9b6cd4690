"""Fuse a rotation by position in plain operations into one ``RotaryEmbedding`` node (ONNX opset 23).

Before:  x [B, H, S, D] ─ Split → x1, x2;  Concat(x1·cos − x2·sin, x2·cos + x1·sin);  cos, sin = Unsqueeze(Gather(table, position_ids)) [B, 1, S, D/2]
After:   x ─ RotaryEmbedding(cos table [max, D/2], sin table, position_ids [B, S], interleaved=0)
Source:  https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; RoFormer, arXiv:2104.09864
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import in_module, is_last_axis, last_size, module_of, node_of, numbers, producer, rank, sizes

N_HALVES, HEADS_RANK = 2, 4


class FuseRotary(FusionRule):
    """Rules: 1. the halves of the last axis are rotated (half-split layout); 2. both tables are read by the same position ids, once for all heads."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        """Cosine and sine stay variables: they are shared by all layers and die with their last user."""
        first, second = op.Split(x, _outputs=["first", "second"], _allow_other_inputs=True)
        turned_first = op.Sub(op.Mul(first, cos), op.Mul(second, sin))
        turned_second = op.Add(op.Mul(second, cos), op.Mul(first, sin))
        return op.Concat(turned_first, turned_second, _outputs=["rotated"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """What RotaryEmbedding would compute differently."""
        yield from self._half_objections(**matched)
        yield from self._table_objections(**matched)

    def _half_objections(self, x: ir.Value, first: ir.Value, rotated: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        if rank(x) != HEADS_RANK:
            yield "the input is not [B, H, S, D]", x
        if not is_last_axis(_axis(first), x) or not is_last_axis(_axis(rotated), x):
            yield "it is not the last axis that is split and joined", x
        half = last_size(first)
        if not isinstance(half, int) or half * N_HALVES != last_size(x):
            yield "the last axis is not split into equal halves", first

    def _table_objections(self, cos: ir.Value, sin: ir.Value, first: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        reads = [_read_table(value) for value in (cos, sin)]
        for read, value in zip(reads, (cos, sin), strict=True):
            if read is None:
                yield "cosine or sine is not read from a constant table by position ids and shared by all heads", value
        (cos_table, cos_positions), (sin_table, sin_positions) = filter(None, reads)
        if cos_positions is not sin_positions:
            yield "cosine and sine are read by different position ids", sin_positions
        if sizes(cos_table) != sizes(sin_table) or last_size(cos_table) != last_size(first):
            yield "the tables are not [positions, D/2], one column for each rotated pair", cos_table

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, rotated: ir.Value, **_: ir.Value) -> ir.Value:
        """One node that reads the tables itself."""
        cos_read, sin_read = _read_table(cos), _read_table(sin)
        assert cos_read is not None
        assert sin_read is not None
        return in_module(op.RotaryEmbedding(x, cos_read[0], sin_read[0], cos_read[1], interleaved=0), module_of(rotated))


def _axis(value: ir.Value) -> int | None:
    return node_of(value).attributes.get_int("axis", 0)


def _read_table(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The table and the position ids that a cosine or sine [B, 1, S, D/2] is read from; None if it comes from elsewhere."""
    unsqueeze = producer(value, "Unsqueeze")
    gather = producer(unsqueeze.inputs[0], "Gather") if unsqueeze is not None and numbers(unsqueeze.inputs[1]) == (1,) else None
    if gather is None or gather.attributes.get_int("axis", 0) != 0:
        return None
    table, position_ids = gather.inputs
    assert table is not None
    assert position_ids is not None
    if not table.is_initializer() or rank(table) != 2 or rank(position_ids) != 2:
        return None
    return table, position_ids


def is_candidate(node: ir.Node) -> bool:
    """Two halves joined on the last axis of [B, H, S, D]."""
    output = node.outputs[0]
    joins_last = node.op_type == "Concat" and rank(output) == HEADS_RANK and is_last_axis(node.attributes.get_int("axis"), output)
    return joins_last and len(node.inputs) == N_HALVES


RULES = RewriteRuleSet([FuseRotary.rule()], commute=True)
