"""Pack the query, key and value projections in front of a ``GroupQueryAttention``, and rotate query and key in one node.

Before:  x ─ MatMul(Transpose(w [n·D, E])) three times, n = H, K, K;  q, k ─ RotaryEmbedding(num_heads=n);  GroupQueryAttention(q, k, v, …)
After:   x ─ MatMul(Transpose(qkv [(H+2K)·D, E])) ─ Split [(H+K)·D, K·D] → both, v;  both ─ RotaryEmbedding(num_heads=H+K) ─ Split [H·D, K·D] → q, k
         With biases [n·D] each MatMul is followed by an Add before, and the packed one by an Add of [(H+2K)·D] after.

ONNX Runtime stores a packed weight once however it is split, so here it is sliced on its last axis, unlike for TensorRT (_packing.py).
Source:  docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, Recorder, place
from graphs.fusions._packing import TURNED, packed_linear, packing_objections
from graphs.fusions._reading import Refused
from graphs.fusions._values import in_module, last_size, module_of, only_user, producer, shape_constant, sizes
from graphs.fusions.pack_qkv import PACKED_NAME

PARTS, LAST_AXIS = ("query", "key", "value"), 2


@dataclass(frozen=True)
class Projection:
    """x ─ MatMul(Transpose(weight)) ─ Add(bias)?"""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


@dataclass(frozen=True)
class Projections:
    """Three linears that read one input, and the attention behind them."""

    attention: ir.Node
    rotations: tuple[ir.Node, ir.Node]
    parts: tuple[Projection, ...]


def is_candidate(node: ir.Node) -> bool:
    """Every GroupQueryAttention whose key and value come apart from the query."""
    return node.op_type == "GroupQueryAttention" and node.domain == CONTRIB and node.inputs[1] is not None


def read(node: ir.Node) -> Projections:
    """The linears in front of an attention; raises Refused."""
    query, key = (producer(value, "RotaryEmbedding") for value in node.inputs[:2])
    if query is None or key is None or query.inputs[1:] != key.inputs[1:]:
        raise Refused("query and key are not rotated by the same tables and positions in front of it")
    if any(only_user(rotation.outputs[0], node.op_type) is not node for rotation in (query, key)):
        raise Refused("a rotated query or key is read elsewhere too")
    sources = (query.inputs[0], key.inputs[0], node.inputs[2])
    parts = tuple(_projection(name, value) for name, value in zip(PARTS, sources, strict=True))
    x, biases = parts[0].x, _biases(parts)
    if any(part.x is not x for part in parts):
        raise Refused("query, key and value are projected from different inputs")
    if biases and len(biases) != len(parts):
        raise Refused("some of query, key and value have a bias and some have none")
    for reason, _ in packing_objections(x, [part.weight for part in parts], PACKED_NAME, biases):
        raise Refused(reason)
    return Projections(node, (query, key), parts)


def _projection(name: str, value: ir.Value | None) -> Projection:
    biased = producer(value, "Add")
    linear = producer(biased.inputs[0] if biased is not None else value, "MatMul")
    turned = producer(linear.inputs[1], "Transpose") if linear is not None else None
    if linear is None or turned is None or tuple(turned.attributes.get_ints("perm", ())) != TURNED:
        raise Refused(f"the {name} is not projected by a transposed weight [out, in]")
    x, weight, bias = linear.inputs[0], turned.inputs[0], biased.inputs[1] if biased is not None else None
    assert x is not None
    assert weight is not None
    return Projection(x, weight, bias)


def _biases(parts: tuple[Projection, ...]) -> tuple[ir.Value, ...]:
    return tuple(part.bias for part in parts if part.bias is not None)


def rewrite(graph: ir.Graph, found: Projections) -> None:
    """The packed linear, cut in two, and what is rotated cut in two again; the attention reads the pieces."""
    op = Recorder()
    attention, (query, key) = found.attention, found.rotations
    module, x = module_of(attention.outputs[0]), found.parts[0].x
    widths = [int(last_size(value) or 0) for value in (query.outputs[0], key.outputs[0], attention.inputs[2])]
    n_heads = [rotation.attributes.get_int("num_heads", 0) for rotation in found.rotations]
    leading, dtype = (sizes(x) or ())[:2], x.dtype
    linear = packed_linear(op, x, [part.weight for part in found.parts], PACKED_NAME, _biases(found.parts))
    both, value = _cut(op, linear, [sum(widths[:2]), widths[2]], f"{module}.parts")
    rotated = in_module(
        op.RotaryEmbedding(both, *query.inputs[1:], interleaved=0, num_heads=sum(n_heads)), module, dtype, (*leading, sum(widths[:2]))
    )
    new_query, new_key = _cut(op, rotated, widths[:2], f"{module}.rotated")
    place(graph, attention, op, [])
    for index, operand in enumerate((new_query, new_key, value)):
        attention.replace_input_with(index, operand)


def _cut(op: Any, value: ir.Value, widths: list[int], name: str) -> list[ir.Value]:
    """Two pieces of the last axis."""
    module, leading = module_of(value).removesuffix(".qkv_proj"), (sizes(value) or ())[:2]
    pieces = op.Split(value, shape_constant(op, name, widths), axis=LAST_AXIS, _outputs=len(widths))
    return [in_module(piece, module, value.dtype, (*leading, width)) for piece, width in zip(pieces, widths, strict=True)]
