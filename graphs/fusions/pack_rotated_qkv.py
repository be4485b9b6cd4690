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
from graphs.fusions._packing import TURNED, packed_linear, packing_objections, rows
from graphs.fusions._reading import Refused, first, need, shape_of
from graphs.fusions._values import in_module, module_of, only_user, producer, shape_constant, sizes
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
    """Linears of query, key and value that read ``x`` [B, S, E], the rotations of the first two, and the attention behind them."""

    attention: ir.Node
    rotations: tuple[ir.Node, ir.Node]
    x: ir.Value
    weights: tuple[ir.Value, ...]
    biases: tuple[ir.Value, ...]


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
    inputs, biases = {part.x for part in parts}, tuple(part.bias for part in parts if part.bias is not None)
    if len(inputs) != 1:
        raise Refused("query, key and value are projected from different inputs")
    if biases and len(biases) != len(parts):
        raise Refused("some of query, key and value have a bias and some have none")
    x, weights = inputs.pop(), tuple(part.weight for part in parts)
    for reason, _ in packing_objections(x, weights, PACKED_NAME, biases):
        raise Refused(reason)
    return Projections(node, (query, key), x, weights, biases)


def _projection(name: str, value: ir.Value | None) -> Projection:
    otherwise = f"the {name} is not projected by a transposed weight [out, in]"
    biased = producer(value, "Add")
    linear = need(value if biased is None else biased.inputs[0], "MatMul", otherwise=otherwise)
    turned = need(linear.inputs[1], "Transpose", otherwise=otherwise)
    if turned.attributes.get_ints("perm") != TURNED:
        raise Refused(otherwise)
    return Projection(first(linear), first(turned), None if biased is None else biased.inputs[1])


def rewrite(graph: ir.Graph, found: Projections) -> None:
    """The packed linear, cut in two, and what is rotated cut in two again; the attention reads the pieces."""
    op, attention, (query, key) = Recorder(), found.attention, found.rotations
    module = module_of(query.outputs[0])
    n_heads = sum(rotation.attributes["num_heads"].as_int() for rotation in (query, key))
    *rotated_widths, value_width = map(rows, found.weights)
    linear = packed_linear(op, found.x, found.weights, PACKED_NAME, found.biases)
    both, value = _cut(op, linear, module, [sum(rotated_widths), value_width], "parts")
    rotated = op.RotaryEmbedding(both, *query.inputs[1:], interleaved=0, num_heads=n_heads)
    in_module(rotated, module, both.dtype, sizes(both))
    new_query, new_key = _cut(op, rotated, module, rotated_widths, "rotated")
    place(graph, attention, op, [])
    for index, operand in enumerate((new_query, new_key, value)):
        attention.replace_input_with(index, operand)


def _cut(op: Any, value: ir.Value, module: str, widths: list[int], name: str) -> list[ir.Value]:
    """Pieces of the last axis."""
    *leading, _ = shape_of(value)
    pieces = op.Split(value, shape_constant(op, f"{module}.{name}", widths), axis=LAST_AXIS, _outputs=len(widths))
    return [in_module(piece, module, value.dtype, (*leading, width)) for piece, width in zip(pieces, widths, strict=True)]
