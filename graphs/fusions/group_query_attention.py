"""Fuse attention, its cache and the head layout into one ``GroupQueryAttention`` node of ONNX Runtime.

Before:  q, k, v [B, S, n·D] ─ Reshape [0, 0, n, D] ─ Transpose ─ [B, n, S, D];  q, k ─ RotaryEmbedding;  q ─ Mul(scale)
         present = Concat(past, k | v);  Attention(q, present_key, present_value, mask, scale=1.0) ─ Transpose ─ Reshape [B, S, H·D]
After:   q, k ─ RotaryEmbedding(num_heads) [B, S, n·D]
         GroupQueryAttention(q, k, v, past, seqlens_k, total_sequence_length, bias) → [B, S, H·D], present
         for all layers: bias [B, 1, S, T] = 0 where a column holds a token or is the row's own, else the smallest number; lengths T − 1 and T

The operator is causal by itself: query i sees columns up to T − S + i. What it does not know is padding on the left, so the padding mask goes in as
a bias; and it counts columns where the model counts positions, so the rotation stays outside (its own takes one position for a whole prompt).
Past and present may be one buffer longer than T: nothing here reads the past's length. Several new tokens over a past need a batch of one.
Source:  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.fusions._causal_mask import CausalMask, read_mask
from graphs.fusions._contrib import CONTRIB, Recorder, place
from graphs.fusions._reading import Refused, first, need, scaled, shape_of
from graphs.fusions._values import in_module, module_of, numbers, only_user, producer, rank, sizes, unreshaped

OPERATOR = "GroupQueryAttention"
HEADS_FIRST, LINEAR_RANK, TIME_AXIS = (0, 2, 1, 3), 3, 2
MASK, PLAIN = 3, {"scale": 1.0}
"""Input of Attention, and its attributes."""
BIAS, SEQLENS, TOTAL = 10, 5, 6
"""Inputs of the operator."""
NOT_JOINED = "its result is not turned and reshaped to [B, S, H · D]"


@dataclass(frozen=True)
class Heads:
    """Heads [B, n, S, D] of a linear's output [B, S, n·D]; ``rotation`` is the RotaryEmbedding between, or None."""

    linear: ir.Value
    count: int
    rotation: ir.Node | None


@dataclass(frozen=True)
class Cached:
    """New keys or values, and the cache before and behind them."""

    heads: Heads
    past: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class GroupedAttention:
    """One attention with its cache; ``joined`` is its result [B, S, H·D]."""

    query: Heads
    key: Cached
    value: Cached
    scale: float
    mask: CausalMask
    joined: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every Attention of the standard domain."""
    return node.op_type == "Attention" and node.domain == ""


def read(node: ir.Node) -> GroupedAttention:
    """What an Attention and the nodes around it compute; raises Refused."""
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    if mask is None or {name: attribute.value for name, attribute in node.attributes.items()} != PLAIN:
        raise Refused("it has no mask, or other attributes than scale = 1")
    unscaled, scale = scaled(first(node))
    heads, keys, values = _heads("query", unscaled), _cached("key", node.inputs[1]), _cached("value", node.inputs[2])
    if heads.rotation is None or keys.heads.rotation is None or values.heads.rotation is not None:
        raise Refused("query and key are rotated, values are not: here it is otherwise")
    if heads.rotation.inputs[1:] != keys.heads.rotation.inputs[1:]:
        raise Refused("query and key are rotated by different tables or positions")
    if keys.heads.count != values.heads.count or heads.count % keys.heads.count:
        raise Refused(f"{heads.count} query heads can't share {keys.heads.count} key heads and {values.heads.count} value heads")
    return GroupedAttention(heads, keys, values, scale, read_mask(mask), _joined(node.outputs[0]))


def _heads(name: str, value: ir.Value) -> Heads:
    rotation = producer(value, "RotaryEmbedding")
    if rotation is not None and any(rotation.attributes.get_int(attribute, 0) != 0 for attribute in ("interleaved", "rotary_embedding_dim")):
        raise Refused(f"the {name} is rotated in interleaved pairs, or in part")
    otherwise = f"the {name} is not a linear's output [B, S, heads · D] that is reshaped and turned to [B, heads, S, D]"
    turned = need(value if rotation is None else rotation.inputs[0], "Transpose", otherwise=otherwise)
    reshape = need(turned.inputs[0], "Reshape", otherwise=otherwise)
    linear = first(reshape)
    if turned.attributes.get_ints("perm") != HEADS_FIRST or rank(linear) != LINEAR_RANK:
        raise Refused(otherwise)
    match numbers(reshape.inputs[1]):
        case (0, 0, int(count), _) if count > 0:
            return Heads(linear, count, rotation)
        case shape:
            raise Refused(f"the {name} is reshaped to {shape}, not to [0, 0, heads, D]")


def _cached(name: str, value: ir.Value | None) -> Cached:
    otherwise = f"the {name} is not the past and the new ones behind it, joined on axis {TIME_AXIS}"
    concat = need(unreshaped(value), "Concat", otherwise=otherwise)
    if len(concat.inputs) != 2 or concat.attributes.get_int("axis") != TIME_AXIS:
        raise Refused(otherwise)
    past, new = concat.inputs
    assert past is not None
    assert new is not None
    return Cached(_heads(name, new), past, concat.outputs[0])


def _joined(attended: ir.Value) -> ir.Value:
    turned = _only_user(attended, "Transpose")
    reshape = _only_user(turned.outputs[0], "Reshape")
    match numbers(reshape.inputs[1]):
        case (0, 0, _) if turned.attributes.get_ints("perm") == HEADS_FIRST:
            return reshape.outputs[0]
    raise Refused(NOT_JOINED)


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    node = only_user(value, op_type)
    if node is None:
        raise Refused(NOT_JOINED)
    return node


def rewrite(graph: ir.Graph, found: GroupedAttention) -> None:
    """One node in the place of the cache, the layout and the attention; what depends on no layer is made once."""
    op, joined = Recorder(), found.joined
    last, module = joined.producer(), module_of(joined)
    assert last is not None
    bias, seqlens, total = _shared(found.mask) or _make_shared(op, found)
    query, key = (_rotated(op, heads, module) for heads in (found.query, found.key.heads))
    attended, *present = op.GroupQueryAttention(
        *(query, key, found.value.heads.linear, found.key.past, found.value.past, seqlens, total, None, None, None, bias),
        num_heads=found.query.count,
        kv_num_heads=found.key.heads.count,
        scale=found.scale,
        do_rotary=0,
        _domain=CONTRIB,
        _outputs=3,
    )
    in_module(attended, module)
    place(graph, last, op, list(zip((joined, found.key.present, found.value.present), (attended, *present), strict=True)))


def _rotated(op: Recorder, heads: Heads, module: str) -> ir.Value:
    """The same rotation of [B, S, n·D]."""
    assert heads.rotation is not None
    rotated = op.RotaryEmbedding(heads.linear, *heads.rotation.inputs[1:], interleaved=0, num_heads=heads.count)
    return in_module(rotated, module, heads.linear.dtype, sizes(heads.linear))


def _shared(mask: CausalMask) -> tuple[ir.Value, ...] | None:
    """Bias and lengths that another layer's node reads already, for the same mask."""
    users = [use.node for use in mask.padding.uses() if use.node.op_type == "Or"]
    for step in ("Where", OPERATOR):
        users = [use.node for node in users for use in node.outputs[0].uses() if use.node.op_type == step]
    return None if not users else tuple(value for index in (BIAS, SEQLENS, TOTAL) if (value := users[0].inputs[index]) is not None)


def _make_shared(op: Recorder, found: GroupedAttention) -> tuple[ir.Value, ...]:
    """Bias [B, 1, S, T] float, seqlens_k [B] int32 and total_sequence_length int32; T − S is the past's length, whatever its buffer's."""
    mask, dtype = found.mask, found.query.linear.dtype
    assert dtype is not None
    (batch, *_, total), (_, new, _) = shape_of(mask.padding), shape_of(found.query.linear)

    def made(value: ir.Value, kind: ir.DataType, *shape: Any) -> ir.Value:
        return in_module(value, mask.module, kind, shape)

    def constant(values: Any, kind: ir.DataType, name: str) -> ir.Value:
        return op.initializer(ir.tensor(values, dtype=kind, name=f"{OPERATOR}.{name}"))

    integer, boolean, narrow = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT32
    one = constant(1, integer, "one")
    first = made(op.Sub(mask.total, mask.new), integer)
    rows = made(op.Range(first, mask.total, one), integer, new)
    turned = made(op.Unsqueeze(rows, constant([1], integer, "axis")), integer, new, 1)
    itself = made(op.Equal(mask.columns, turned), boolean, new, total)
    allowed = made(op.Or(mask.padding, itself), boolean, batch, 1, new, total)
    smallest = float(np.finfo(dtype.numpy()).min)
    bias = made(op.Where(allowed, constant(0.0, dtype, "zero"), constant(smallest, dtype, "smallest")), dtype, batch, 1, new, total)
    length = made(op.Cast(mask.total, to=int(narrow)), narrow)
    rows_of_batch = made(op.Shape(mask.padding, end=1), integer, 1)
    seqlens = made(op.Expand(made(op.Sub(length, constant(1, narrow, "one_int32")), narrow), rows_of_batch), narrow, batch)
    return bias, seqlens, length
