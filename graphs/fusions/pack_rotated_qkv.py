"""Pack the query, key and value projections in front of a ``GroupQueryAttention``, and rotate all their heads in one node.

Before:  x ─ MatMul(Transpose(w [n·D, E])) three times, n = H, K, K;  q, k ─ RotaryEmbedding(cos, sin, positions);  GroupQueryAttention(q, k, v, …)
After:   x ─ MatMul(Transpose(qkv [N·D, E])) ─ Reshape [B, S·N, D] ─ RotaryEmbedding(cos', sin', num_heads=1) ─ Reshape [B, S, N·D]
         GroupQueryAttention(qkv, –, –, …), N = H+2K
         for all layers: cos', sin' [B, S·N, D/2] = the row of the token's position for its first H+K heads, 1 and 0 for its values
         With biases [n·D] each MatMul is followed by an Add before, and the packed one by an Add of [N·D] after.

Nothing is copied: the heads of a row lie one behind the other, so that each is a row by itself, and a value is rotated by nothing, which keeps every
finite number (−0 may become 0). Splitting rotated from unrotated and query from key took two nodes more a layer, and the attention three inputs.
Source:  docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, GROUPED, Recorder
from graphs.fusions._grouped_heads import feed_packed, read_qkv, read_tables
from graphs.fusions._packing import Projections, rows
from graphs.fusions._reading import Refused, shape_of
from graphs.fusions._values import in_module, module_of, only_user, producer, shape_constant
from graphs.fusions.pack_qkv import PACKED_NAME

HEADS_AXIS = 2
NEUTRAL = (1.0, 0.0)
"""Cosine and sine of no rotation."""


@dataclass(frozen=True)
class Rotation:
    """Tables cos and sin [positions, D/2], the positions [B, S] at which they are read, and the heads of query and key."""

    tables: tuple[ir.Value, ir.Value]
    positions: ir.Value
    heads: tuple[int, int]
    module: str


@dataclass(frozen=True)
class RotatedProjections:
    """What query, key and value are projected from and by, how the first two are rotated, and the attention behind them."""

    attention: ir.Node
    rotation: Rotation
    projections: Projections


def is_candidate(node: ir.Node) -> bool:
    """Every GroupQueryAttention whose key and value come apart from the query."""
    return node.op_type == GROUPED and node.domain == CONTRIB and node.inputs[1] is not None


def read(node: ir.Node) -> RotatedProjections:
    """The linears in front of an attention; raises Refused."""
    query, key = (producer(value, "RotaryEmbedding") for value in node.inputs[:2])
    if query is None or key is None or query.inputs[1:] != key.inputs[1:]:
        raise Refused("query and key are not rotated by the same tables and positions in front of it")
    if any(only_user(rotation.outputs[0], node.op_type) is not node for rotation in (query, key)):
        raise Refused("a rotated query or key is read elsewhere too")
    heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    if heads != tuple(rotation.attributes.get_int("num_heads") for rotation in (query, key)) or node.attributes.get_int("do_rotary"):
        raise Refused("the attention has other heads than are rotated in front of it, or rotates them itself")
    rotation = Rotation(*_tables(query, key), heads, module_of(query.outputs[0]))
    return RotatedProjections(node, rotation, read_qkv(query.inputs[0], key.inputs[0], node.inputs[2]))


def _tables(query: ir.Node, key: ir.Node) -> tuple[tuple[ir.Value, ir.Value], ir.Value]:
    """What both are rotated by, whole heads, in halves: cos and sin, and the positions."""
    if any(rotation.attributes.get_int(name, 0) for rotation in (query, key) for name in ("interleaved", "rotary_embedding_dim")):
        raise Refused("the query or the key is rotated in interleaved pairs, or in part")
    cos, sin, positions = read_tables(query)
    return (cos, sin), positions


def rewrite(graph: ir.Graph, found: RotatedProjections) -> None:
    """The packed linear and its heads, all rotated, are the attention's one input."""
    op, rotation, weights = Recorder(), found.rotation, found.projections.weights
    linear = found.projections.packed(op, PACKED_NAME)  # [B, S, N·D]
    (batch, new, _), dtype, module = shape_of(linear), linear.dtype, rotation.module
    size, width = rows(weights[0]) // rotation.heads[0], sum(map(rows, weights))
    cos, sin = _by_head(op, rotation, width // size)
    heads = in_module(op.Reshape(linear, shape_constant(op, f"{module}.heads", [0, -1, size])), module, dtype, (batch, None, size))
    rotated = in_module(op.RotaryEmbedding(heads, cos, sin, interleaved=0, num_heads=1), module, dtype, (batch, None, size))
    packed = in_module(op.Reshape(rotated, shape_constant(op, f"{module}.packed", [0, -1, width])), module, dtype, (batch, new, width))
    feed_packed(graph, op, found.attention, packed)


def _by_head(op: Recorder, rotation: Rotation, n_heads: int) -> list[ir.Value]:
    """Cosines and sines [B, S·N, D/2]: rows of the tables for the heads that are rotated, which come first; made once for all layers."""
    n_rotated = sum(rotation.heads)
    name = f"RotaryEmbedding.{n_rotated}_of_{n_heads}"
    is_rotated = op.initializer(ir.tensor([[head < n_rotated] for head in range(n_heads)], name=name))
    return [
        _made(table, rotation.positions, name) or _spread(op, table, rotation.positions, is_rotated, neutral)
        for table, neutral in zip(rotation.tables, NEUTRAL, strict=True)
    ]


def _made(table: ir.Value, positions: ir.Value, name: str) -> ir.Value | None:
    """What another layer's heads are rotated by, if it is the same."""
    nodes = [use.node for use in table.uses() if use.node.op_type == "Gather" and use.node.inputs[1] is positions]
    for op_type in ("Unsqueeze", "Where", "Reshape"):
        nodes = [use.node for node in nodes for use in node.outputs[0].uses() if use.node.op_type == op_type]
        nodes = [node for node in nodes if op_type != "Where" or getattr(node.inputs[0], "name", None) == name]
    return nodes[0].outputs[0] if nodes else None


def _spread(op: Recorder, table: ir.Value, positions: ir.Value, is_rotated: ir.Value, neutral: float) -> ir.Value:
    """Rows of one table by position and head, and ``neutral`` where a head is not rotated."""
    module, dtype, (batch, new), (_, half), (n_heads, _) = _owner(table), table.dtype, shape_of(positions), shape_of(table), shape_of(is_rotated)
    assert dtype is not None
    assert isinstance(half, int)

    def made(value: ir.Value, *shape: Any) -> ir.Value:
        return in_module(value, module, dtype, shape)

    axis, rows_shape = (shape_constant(op, f"{table.name}.{name}", shape) for name, shape in (("axis", [HEADS_AXIS]), ("rows", [0, -1, half])))
    found = made(op.Unsqueeze(made(op.Gather(table, positions, axis=0), batch, new, half), axis), batch, new, 1, half)
    otherwise = op.initializer(ir.tensor(neutral, dtype=dtype, name=f"{table.name}.unrotated"))
    return made(op.Reshape(made(op.Where(is_rotated, found, otherwise), batch, new, n_heads, half), rows_shape), batch, None, half)


def _owner(table: ir.Value) -> str:
    """The module that a table belongs to, by its name: `model.rotary_emb.cos` → `model.rotary_emb`."""
    return str(table.name).rpartition(".")[0]
