"""Fuse attention, its cache and the head layout of another exporter's graph into one ``GroupQueryAttention`` node of ONNX Runtime.

Before:  what foreign_attention.py, foreign_rotary.py and foreign_shape.py leave:
         q, k, v [B, S, n·D] ─ Reshape [0, 0, n, D] ─ Transpose ─ [B, n, S, D];  q, k ─ RotaryEmbedding(cos, sin);  q ─ Mul(scale)
         present = Concat(past, k | v);  Attention(q, present_key, present_value, mask bool [B, 1, S, T], scale=1.0) ─ Transpose ─ Reshape
After:   as group_query_attention.py; bias [B, 1, S, T] = 0 where the mask allows, else the smallest number, for all layers

The operator is causal by itself, so a mask that is not is refused; whether it is, is tried, not proven (graphs/fusions/_causal_samples.py).
Source:  docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.fusions._causal_samples import check_causal
from graphs.fusions._contrib import BIAS, GROUPED, SEQLENS, TOTAL, Recorder
from graphs.fusions._grouped_heads import SIZE_STEP, TIME_AXIS, Grouped, is_attention, read_concatenated, read_grouped, read_mask_input
from graphs.fusions._reading import Refused, shape_of
from graphs.fusions._values import in_module
from graphs.partition import upstream

is_candidate = is_attention
HEADS_RANK = 4


@dataclass(frozen=True)
class MaskedAttention:
    """One attention with its cache, its mask bool [B, 1, S, T], and what another layer made of the same mask: bias, lengths; or nothing."""

    grouped: Grouped
    mask: ir.Value
    shared: tuple[ir.Value, ...]


def read(node: ir.Node) -> MaskedAttention:
    """What an Attention and the nodes around it compute; raises Refused."""
    mask = read_mask_input(node)
    rows_and_columns = [size for value in node.inputs[:2] for size in shape_of(value)[TIME_AXIS : TIME_AXIS + 1]]
    if mask.dtype != ir.DataType.BOOL or shape_of(mask)[1:] != (1, *rows_and_columns):
        raise Refused(f"the mask is {mask.dtype} {list(shape_of(mask))}, not bool [B, 1, S, T]")
    grouped, shared = read_grouped(node, read_concatenated, SIZE_STEP), _shared(mask)
    if not shared:
        check_causal(mask)
    if not {grouped.key.present, grouped.value.present}.isdisjoint(upstream([mask])):
        raise Refused("the mask is computed from the keys or values that the operator itself joins")
    return MaskedAttention(grouped, mask, shared)


def rewrite(graph: ir.Graph, found: MaskedAttention) -> None:
    """One node in the place of the cache, the layout and the attention; what depends on no layer is made once."""
    op = Recorder()
    found.grouped.replace_masked(graph, op, *(found.shared or _make_shared(op, found)))


def _shared(mask: ir.Value) -> tuple[ir.Value, ...]:
    """Bias and lengths that another layer's node reads already, for the same mask."""
    choices = [use.node for use in mask.uses() if use.node.op_type == "Where"]
    readers = [use.node for node in choices for use in node.outputs[0].uses() if use.node.op_type == GROUPED]
    return tuple(value for index in (BIAS, SEQLENS, TOTAL) if readers and (value := readers[0].inputs[index]) is not None)


def _make_shared(op: Recorder, found: MaskedAttention) -> tuple[ir.Value, ...]:
    """Bias [B, 1, S, T], seqlens_k [B] int32 and total_sequence_length int32, all of T tokens."""
    dtype, narrow = found.grouped.query.linear.dtype, ir.DataType.INT32
    assert dtype is not None

    def constant(values: Any, kind: ir.DataType, name: str) -> ir.Value:
        return op.initializer(ir.tensor(values, dtype=kind, name=f"{GROUPED}.{name}"))

    smallest = float(np.finfo(dtype.numpy()).min)
    bias = op.Where(found.mask, constant(0.0, dtype, "zero"), constant(smallest, dtype, "smallest"))
    in_module(bias, "", dtype, shape_of(found.mask))
    columns = op.Squeeze(op.Shape(found.mask, start=HEADS_RANK - 1), constant([0], ir.DataType.INT64, "first_axis"))
    total = op.Cast(columns, to=int(narrow))
    seqlens = op.Expand(op.Sub(total, constant(1, narrow, "one_int32")), op.Shape(found.grouped.key.past, end=1))
    return bias, seqlens, total
