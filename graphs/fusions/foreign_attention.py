"""Fuse scaled-dot-product attention as other exporters write it into one ``Attention`` node; grouped keys and values are no longer expanded.

Before:  MatMul(query·a, (key·b)ᵀ)·c ─ Add(bias) | Where(mask, ·, smallest) ─ Cast(float32)? ─ Softmax
         ─ Where(IsNaN(·), 0, ·)? ─ Cast(back)? ─ MatMul(value)
         key, value [B, K, T, D], or each head repeated: Unsqueeze(2) ─ Expand ─ Reshape [B, H, T, D]
         or Attention(query, repeated key, repeated value, mask, scale), as torch's exporter writes it for opset 23
         or the queries of a group stacked as rows of their one key head, as --min-tensorrt writes it (graphs/lowering/attention.py)
         query and key may be float16, value float16 that is cast to float32 and the result float32, as optimum writes float16
After:   Attention(query·a·b·c [B, H, S, D], key, value, mask bool [B, 1, S, T], scale=1.0) ─ Cast(float32)?

The scale moves to the query: with another scale ONNX multiplies query and key by its root, and TensorRT then rescales the whole cache. The IsNaN
guard goes: it answers fully masked rows, and the mask leaves none (graphs/fusions/_foreign_mask.py).
Source:  https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from graphs.fusions._foreign_mask import (
    Condition,
    check_conditions,
    check_new_are_last,
    condition_of_bias,
    condition_of_choice,
    is_nothing,
    joined_mask,
)
from graphs.fusions._reading import Refused, Tape, first, need, need_user, op_of, operands, scaled, shape_of, user
from graphs.fusions._repeated_heads import unrepeated
from graphs.fusions._stacked_heads import mask_of_one, unstacked
from graphs.fusions._values import cast_to, is_last_axis, last_size, node_of, producer, rank, scalar, sizes

HEADS_RANK = 4
ATTENTION_INPUTS = 4
"""query, key, value, mask: an Attention that also takes a past keeps the cache inside, which TensorRT does not parse."""

NO_VALUES = "the soft-max's result is not multiplied by values"


@dataclass(frozen=True)
class Heads:
    """One attention: query [B, H, S, D] not yet scaled, key and value [B, K, T, D] not repeated."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    conditions: tuple[Condition, ...]
    attended: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every soft-max could be attention's; an Attention node that repeats heads, or scales, is one that was not finished."""
    if node.op_type == "Attention" and node.domain == "":
        return scalar_scale(node) != 1 or any(producer(value, "Reshape") for value in node.inputs[1:3])
    return node.op_type == "Softmax"


def scalar_scale(node: ir.Node) -> float | None:
    """The scale attribute of an Attention node; None means one over the root of head_dim."""
    return node.attributes.get_float("scale") if "scale" in node.attributes else None


def read(node: ir.Node) -> Heads:
    """The attention around a soft-max, or of an Attention node; raises Refused."""
    found = _read_fused(node) if node.op_type == "Attention" else _read_softmax(node)
    query, key, value = (shape_of(one) for one in (found.query, found.key, found.value))
    if not len(query) == len(key) == len(value) == HEADS_RANK:
        raise Refused("query, key and value are not [B, heads, ·, D]")
    n_query, n_key, n_value = query[1], key[1], value[1]
    if not isinstance(n_query, int) or not isinstance(n_key, int) or n_key != n_value or n_query % n_key:
        raise Refused(f"{n_query} query heads can't share {n_key} key heads and {n_value} value heads")
    new, total = query[2], key[2]
    if None in (new, total) or total != value[2]:
        raise Refused(f"there are {new} queries, {total} keys and {value[2]} values: not known, or not alike")
    check_new_are_last("keys", found.key, new)
    check_new_are_last("values", found.value, new)
    check_conditions(found.conditions, new, total)
    return found


def rewrite(graph: ir.Graph, found: Heads) -> None:
    """One node that reads the cache itself."""
    tape, query = Tape(graph, found.attended), found.query
    if found.scale != 1:
        query = tape.add("Mul", query, tape.constant(found.scale, query.dtype), like=query, shape=sizes(query))
    mask = joined_mask(tape, found.conditions)
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape((None, 1, shape_of(query)[2], shape_of(found.key)[2]))
    attended = tape.add("Attention", query, found.key, found.value, mask, scale=1.0, like=query, shape=sizes(found.attended))
    if found.attended.dtype != query.dtype:
        tape.add("Cast", attended, to=int(ir.DataType.FLOAT))
    tape.finish()


def _read_fused(node: ir.Node) -> Heads:
    attributes, inputs = node.attributes, [value for value in node.inputs if value is not None]
    if len(inputs) != ATTENTION_INPUTS or len(node.outputs) != 1:
        raise Refused(f"the Attention node has {len(inputs)} inputs and {len(node.outputs)} outputs; expected query, key, value, mask and one output")
    if attributes.get_int("is_causal", 0) or attributes.get_float("softcap", 0):
        raise Refused("the Attention node is causal from its first key on, or caps its scores")
    query, key, value, mask = inputs
    head_dim, scale = last_size(query), scalar_scale(node)
    if scale is None:
        if not isinstance(head_dim, int):
            raise Refused("the scale is not given, and head_dim is not known")
        scale = float(head_dim) ** -0.5
    condition = Condition(mask, allows=True) if mask.dtype == ir.DataType.BOOL else condition_of_bias(mask)
    return Heads(query, unrepeated(key), unrepeated(value), scale, (condition,), node.outputs[0])


def _read_softmax(softmax: ir.Node) -> Heads:
    weights = softmax.outputs[0]
    if rank(weights) != HEADS_RANK or not is_last_axis(softmax.attributes.get_int("axis", -1), weights):
        raise Refused("the soft-max is not over the last axis of [B, heads, S, T], the keys")
    attended, value = product_with_values(weights)
    scores, conditions, factor = _unmasked(first(softmax))
    query, key, scale = _query_and_key(scores)
    narrow = before_widening(value)
    if query.dtype not in (value.dtype, narrow.dtype):
        raise Refused(f"the query is {query.dtype}, the value {value.dtype}")
    kept = value if value.dtype == query.dtype else narrow
    query, attended, group = unstacked(query, attended)
    conditions = tuple(replace(condition, value=mask_of_one(condition.value, group)) for condition in conditions)
    return Heads(query, unrepeated(key), unrepeated(kept), factor * scale, conditions, attended)


def before_widening(value: ir.Value) -> ir.Value:
    """The float16 values behind a cast to float32; the value itself where there is none."""
    (source,) = operands(value, "Cast") or (value,)
    return source if (source.dtype, value.dtype) == (ir.DataType.FLOAT16, ir.DataType.FLOAT) else value


def product_with_values(weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What the soft-max's result becomes, multiplied by the values: (product, values)."""
    guard = user(weights, "Where")
    if guard is not None:
        is_nan, zero, _ = guard.inputs
        if operands(is_nan, "IsNaN") != (weights,) or scalar(zero) != 0:
            raise Refused("the soft-max's result is replaced where it is not NaN")
        weights = guard.outputs[0]
    dtypes = []
    while (rounded := user(weights, "Cast")) is not None:
        weights = rounded.outputs[0]
        dtypes.append(weights.dtype)
    product = need_user(weights, "MatMul", otherwise=NO_VALUES)
    values = product.inputs[1]
    assert values is not None
    if values is weights:
        raise Refused(NO_VALUES)
    for dtype in dtypes:
        if dtype not in (ir.DataType.FLOAT, values.dtype):
            raise Refused(f"the soft-max's result is rounded to {dtype} on its way to values of {values.dtype}")
    return product.outputs[0], values


def _unmasked(scores: ir.Value) -> tuple[ir.Value, tuple[Condition, ...], float]:
    """Scores before masks, casts and scales: the product of query and key, the masks' conditions, and the product of the scales."""
    conditions: list[Condition] = []
    scale = 1.0
    while True:
        scores, factor = scaled(scores)
        scale *= factor
        node = scores.producer()
        if node is None:
            raise Refused("the soft-max is not of a product of query and key")
        if node.op_type == "MatMul":
            return scores, tuple(conditions), scale
        if scale != 1 and node.op_type in ("Add", "Where"):
            raise Refused("masked scores are scaled: the mask would be scaled too")
        inputs = [value for value in node.inputs if value is not None]
        if cast_to(scores) == ir.DataType.FLOAT:
            scores = inputs[0]
        elif node.op_type == "Add":
            scores, bias = inputs if _is_product(inputs[0]) else inputs[::-1]
            conditions.append(condition_of_bias(bias))
        elif node.op_type == "Where":
            condition, scores = condition_of_choice(*inputs)
            conditions.append(condition)
        elif node.op_type == "Max" and any(is_nothing(scalar(one)) for one in inputs):  # what is masked twice is not −inf
            (scores,) = (one for one in inputs if scalar(one) is None)
        else:
            raise Refused(f"the scores come from {node.op_type}; expected a product of query and key, scaled and masked")


def _is_product(value: ir.Value) -> bool:
    """Whether scores, not a mask, lie behind a value: a product of two computed matrices, maybe scaled, cast or masked."""
    source = scaled(value)[0]
    if op_of(source) in ("Add", "Cast"):
        return any(_is_product(one) for one in node_of(source).inputs if one is not None)
    return op_of(source) == "MatMul"


def _query_and_key(scores: ir.Value) -> tuple[ir.Value, ir.Value, float]:
    """Query and key behind their product, before their scales: (query, key [B, ·, T, D], scale)."""
    query, turned = node_of(scores).inputs
    assert query is not None
    assert turned is not None
    query, query_scale = scaled(query)
    turned, turned_scale = scaled(turned)
    key, key_scale = scaled(_unturned(turned))
    return query, key, query_scale * turned_scale * key_scale


def _unturned(turned: ir.Value) -> ir.Value:
    """The key [B, ·, T, D] behind its transposition, written on four axes or on three."""
    source = _turned_on_three(turned) if op_of(turned) == "Reshape" else None
    if source is not None:
        return source
    transpose = need(turned, "Transpose", otherwise=f"the key is not transposed, but comes from {op_of(turned) or 'an input'}")
    if tuple(transpose.attributes.get_ints("perm", ())) != (0, 1, 3, 2):
        raise Refused("the key is transposed otherwise than on its last two axes")
    return first(transpose)


def _turned_on_three(turned: ir.Value) -> ir.Value | None:
    """[B, H, T, D] → [B·H, T, D] → turned → [B, H, D, T]: each head is one matrix on the way. None for other ways."""
    inner = producer(first(node_of(turned)), "Transpose")
    flat = producer(first(inner), "Reshape") if inner is not None else None
    if flat is None:
        return None
    assert inner is not None
    if tuple(inner.attributes.get_ints("perm", ())) != (0, 2, 1):
        return None
    source = first(flat)
    before, between = shape_of(source), shape_of(flat.outputs[0])  # the product with the query leaves one way to four axes again
    return source if None not in before and between[1:] == before[2:] else None
