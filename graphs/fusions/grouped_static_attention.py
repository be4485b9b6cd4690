"""Fuse attention over a static cache, the writes into it, the rotation and the head layout into one ``GroupQueryAttention`` of ONNX Runtime.

Before:  q, k, v [B, S, n·D] ─ Reshape [0, 0, n, D] ─ Transpose ─ [B, n, S, D];  q, k ─ RotaryEmbedding(cos, sin, positions);  q ─ Mul(scale)
         present = TensorScatter(past, k | v, write_indices)
         Attention(q, present_key, present_value, , , , lengths, is_causal=1, scale=1.0) ─ Transpose ─ Reshape [B, S, H·D]
After:   GroupQueryAttention(q, k, v, past, lengths − 1, largest length, cos, sin, positions, do_rotary=1) → [B, S, H·D], present
         for all layers: lengths − 1 [B] and their maximum, int32

The operator counts by what the contract of write_indices, lengths and positions says (artifact/io_spec.py): it writes row b from slot lengths[b] − S
on, and row r of S attends to slot c where c ≤ r + (lengths − S). In a first prompt it rotates every row from the first position of row 0 on, then by
the positions; rows begin in slot 0 and have the positions of their slots, so both are each one's own. A dynamic cache pads on the left, and is
rotated outside (pack_rotated_qkv.py).
Several new tokens over a past need a batch of one.
Source:  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention; docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from artifact.io_spec import KEY_VALUE_LENGTHS
from graphs.fusions._contrib import GROUPED, SEQLENS, TOTAL, Recorder
from graphs.fusions._grouped_heads import Cached, Grouped, is_attention, read_grouped, read_heads, read_tables
from graphs.fusions._reading import Refused, need
from graphs.fusions._values import in_module, unreshaped
from graphs.fusions.static_attention import is_input, not_in_place

BY_LENGTHS = {"is_causal": 1, "scale": 1.0}
MASK, LENGTHS = 3, 6
"""Attributes of an Attention that masks by lengths alone, and inputs of it."""
SIZE_STEP = 16
"""Head sizes that the operator takes are multiples of this where it rotates."""
is_candidate = is_attention


@dataclass(frozen=True)
class AttentionByLengths:
    """One attention with its cache, the tables and positions that rotate it, and the slots in use of each row [B]."""

    grouped: Grouped
    rotated_by: tuple[ir.Value, ir.Value, ir.Value]
    lengths: ir.Value


def read(node: ir.Node) -> AttentionByLengths:
    """What an Attention and the nodes around it compute; raises Refused."""
    lengths = node.inputs[LENGTHS] if len(node.inputs) > LENGTHS else None
    if lengths is None or node.inputs[MASK] is not None or {name: attribute.value for name, attribute in node.attributes.items()} != BY_LENGTHS:
        raise Refused("it is not masked by lengths alone, causal and with scale = 1")
    if not is_input(lengths, KEY_VALUE_LENGTHS):
        raise Refused(f"its lengths are not the graph's {KEY_VALUE_LENGTHS}")
    grouped = read_grouped(node, _cached, SIZE_STEP)
    query, key = grouped.query.rotation, grouped.key.heads.rotation
    assert query is not None
    assert key is not None
    if query.attributes.get_int("interleaved") or key.attributes.get_int("interleaved"):
        raise Refused("the query or the key is rotated in interleaved pairs")
    return AttentionByLengths(grouped, read_tables(query), lengths)


def _cached(name: str, value: ir.Value | None) -> Cached:
    otherwise = f"the {name} is no cache that TensorScatter writes into"
    scatter = need(unreshaped(value), "TensorScatter", otherwise=otherwise)
    reason = not_in_place(scatter.outputs[0])
    if reason:
        raise Refused(reason)
    past, new = scatter.inputs[:2]
    assert past is not None
    assert new is not None
    return Cached(read_heads(name, new), past, scatter.outputs[0])


def rewrite(graph: ir.Graph, found: AttentionByLengths) -> None:
    """One node in the place of the cache, the layout, the rotation and the attention; what depends on no layer is made once."""
    op, grouped = Recorder(), found.grouped
    linears = (grouped.query.linear, grouped.key.heads.linear, grouped.value.heads.linear)
    counted = _shared(found.lengths) or _make_shared(op, found.lengths)
    grouped.replace(graph, op, (*linears, grouped.key.past, grouped.value.past, *counted, *found.rotated_by), do_rotary=1)


def _shared(lengths: ir.Value) -> tuple[ir.Value, ...] | None:
    """Lengths that another layer's node reads already."""
    values, nodes = [lengths], list[ir.Node]()
    for step in ("Sub", "Cast", GROUPED):
        nodes = [use.node for value in values for use in value.uses() if use.node.op_type == step]
        values = [node.outputs[0] for node in nodes]
    return tuple(value for index in (SEQLENS, TOTAL) if (value := nodes[0].inputs[index]) is not None) if nodes else None


def _make_shared(op: Recorder, lengths: ir.Value) -> tuple[ir.Value, ...]:
    """seqlens_k [B] int32 and total_sequence_length int32."""
    integer, narrow, batch = ir.DataType.INT64, ir.DataType.INT32, lengths.shape

    def made(value: ir.Value, kind: ir.DataType, *shape: Any) -> ir.Value:
        return in_module(value, "", kind, shape)

    assert batch is not None
    one = op.initializer(ir.tensor(1, dtype=integer, name=f"{GROUPED}.one"))
    less_one = made(op.Cast(made(op.Sub(lengths, one), integer, batch[0]), to=int(narrow)), narrow, batch[0])
    largest = made(op.Cast(made(op.ReduceMax(lengths, keepdims=0), integer), to=int(narrow)), narrow)
    return less_one, largest
