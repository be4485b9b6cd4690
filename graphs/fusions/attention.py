"""Fuse masked scaled-dot-product attention into one ``Attention`` node (ONNX opset 23); grouped keys and values are no longer expanded.

Before:  MatMul(query, Transpose(K)) ─ Where(mask, ·, finfo.min) ─ Cast(float32)? ─ Softmax ─ Cast(back)? ─ MatMul(V)
         K, V = key, value [B, K, T, D], or each head repeated: Unsqueeze(2) ─ Expand ─ Reshape [B, H, T, D]
After:   Attention(query [B, H, S, D], key, value, mask bool [B, 1, S, T], scale=1.0)
         key, value = K, V; grouped ones (K < H) behind a Reshape [0, 0, 0, 0], which changes nothing: without it TensorRT's prefill kernel is
         not told of the groups and reads keys and values that another kernel repeats for it, H / K times the memory (docs/adr/007)

The query comes scaled: with another scale ONNX multiplies query and key by its root, and TensorRT then rescales the whole cache.
softmax_precision stays unset: TensorRT refuses it, and its kernels accumulate in float32 anyway. A fully masked row (uniform before, zeros
after) must not occur: the exporter's mask lets every row attend to itself.
Source:  https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import Shape, cast_to, in_module, is_last_axis, module_of, node_of, numbers, producer, rank, scalar, shape_constant, sizes

HEADS_RANK = 4
SMALLEST = {ir.DataType.FLOAT: float(np.finfo(np.float32).min), ir.DataType.FLOAT16: float(np.finfo(np.float16).min)}


class FuseAttention(FusionRule):
    """Rules: 1. the mask is boolean and shared by all heads; 2. query head h reads key head h // (H / K), the only repetition that Attention means.

    Args:
        upcast: match the form of float16 graphs, whose softmax is float32 between two casts.
    """

    def __init__(self, *, upcast: bool) -> None:
        super().__init__(name=f"attention, upcast={upcast}")
        self.upcast = upcast

    def pattern(self, op: Any, query: Any, key: Any, value: Any, mask: Any, fill: Any) -> Any:
        """The repetition of heads is read in ``unrepeated``: it may be there or not."""
        scores = op.MatMul(query, op.Transpose(key, _outputs=["turned_key"]))
        masked = op.Where(mask, scores, fill)
        weights = op.Softmax(op.Cast(masked, _outputs=["scores32"]) if self.upcast else masked, _outputs=["weights"])
        if self.upcast:
            weights = op.Cast(weights, _outputs=["rounded"])
        return op.MatMul(weights, value, _outputs=["attended"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """What Attention would compute differently."""
        yield from self._softmax_objections(**matched)
        yield from self._mask_objections(**matched)
        yield from self._head_objections(**matched)

    def _softmax_objections(
        self, query: ir.Value, weights: ir.Value, scores32: ir.Value | None = None, rounded: ir.Value | None = None, **_: ir.Value
    ) -> Iterator[Objection]:
        if not is_last_axis(node_of(weights).attributes.get_int("axis", -1), weights):
            yield "the softmax is not over the last axis, the keys", weights
        if scores32 is not None and cast_to(scores32) != ir.DataType.FLOAT:
            yield f"the softmax is {cast_to(scores32)}, not FLOAT", scores32
        if rounded is not None and cast_to(rounded) != query.dtype:
            yield f"the softmax is cast to {cast_to(rounded)}, the query is {query.dtype}", rounded

    def _mask_objections(self, query: ir.Value, mask: ir.Value, fill: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        if query.dtype not in SMALLEST or scalar(fill) != SMALLEST[query.dtype]:
            yield f"masked scores are not set to the smallest {query.dtype}", fill
        shape = sizes(mask)
        if mask.dtype != ir.DataType.BOOL or shape is None or len(shape) != HEADS_RANK or shape[1] != 1:
            yield "the mask is not bool [B, 1, S, T]", mask

    def _head_objections(self, query: ir.Value, key: ir.Value, value: ir.Value, turned_key: ir.Value, **_: ir.Value) -> Iterator[Objection]:
        if tuple(node_of(turned_key).attributes.get_ints("perm", ())) != (0, 1, 3, 2):
            yield "the key is not transposed on its last two axes", turned_key
        for repeated in (key, value):
            reason = unrepeated(repeated)[1]
            if reason:
                yield reason, repeated
        n_query, n_key, n_value = (_n_heads(operand) for operand in (query, unrepeated(key)[0], unrepeated(value)[0]))
        if n_query is None or n_key is None or n_value is None:
            yield "query, key and value are not [B, heads, ·, D] with known numbers of heads", query
        elif n_key != n_value or n_query % n_key:
            yield f"{n_query} query heads can't share {n_key} key heads and {n_value} value heads", key

    def rewrite(self, op: Any, **matched: ir.Value) -> ir.Value:
        """One node that reads the cache itself."""
        query, module = matched["query"], module_of(matched["attended"])
        cache = [unrepeated(matched[part])[0] for part in ("key", "value")]
        if _n_heads(cache[0]) != _n_heads(query):
            unchanged = shape_constant(op, f"{matched['attended'].name}.unchanged", [0] * HEADS_RANK)
            cache = [in_module(op.Reshape(part, unchanged), module, part.dtype, sizes(part)) for part in cache]
        return in_module(op.Attention(query, *cache, matched["mask"], scale=1.0), module)


def unrepeated(value: ir.Value) -> tuple[ir.Value, str]:
    """What a key or value [B, H, T, D] is before its heads are repeated.

    Returns:
        The source [B, K, T, D] (the value itself if nothing is repeated), and why the repetition is not the one that Attention means, or "".
    """
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    if expand is None:
        return value, ""
    unsqueeze = producer(expand.inputs[0], "Unsqueeze")
    if unsqueeze is None:
        return value, "heads are expanded, but not on a new axis"
    source, axes = unsqueeze.inputs[0], numbers(unsqueeze.inputs[1])
    assert source is not None
    if axes == (1,):
        return value, "heads are tiled (0, 1, 0, 1); Attention repeats each one (0, 0, 1, 1)"
    if axes != (2,) or rank(source) != HEADS_RANK:
        return value, "heads are not repeated on a new axis behind their own"
    reason = _more_than_heads(sizes(source), sizes(expand.outputs[0]), sizes(value))
    return (value, reason) if reason else (source, "")


def _more_than_heads(shape: Shape | None, expanded: Shape | None, joined: Shape | None) -> str:
    """Why [B, K, T, D] → [B, K, H/K, T, D] → [B, H, T, D] is more than a repetition of heads, or ""."""
    assert shape is not None
    if expanded is None or joined is None:
        return "the shapes of the repeated heads are not known"
    batch, n_heads, total, head_dim = shape
    counts = [count for count in (n_heads, *expanded[2:3], *joined[1:2]) if isinstance(count, int)]
    known = len(counts) == 3 and counts[2] == counts[0] * counts[1]
    if known and expanded == (batch, n_heads, counts[1], total, head_dim) and joined == (batch, counts[2], total, head_dim):
        return ""
    return f"heads {list(shape)} are repeated to {list(expanded)} and {list(joined)}: more than the heads changes"


def _n_heads(value: ir.Value) -> int | None:
    shape = sizes(value) or ()
    return shape[1] if len(shape) == HEADS_RANK and isinstance(shape[1], int) else None


def is_candidate(node: ir.Node) -> bool:
    """Every softmax could be attention's."""
    return node.op_type == "Softmax"


RULES = RewriteRuleSet([FuseAttention.rule(upcast=True), FuseAttention.rule(upcast=False)])
