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
from graphs.fusions._contrib import BIAS, GROUPED, SEQLENS, TOTAL, Recorder
from graphs.fusions._grouped_heads import SIZE_STEP, Grouped, is_attention, read_concatenated, read_grouped, read_mask_input
from graphs.fusions._reading import shape_of
from graphs.fusions._values import in_module

is_candidate = is_attention


@dataclass(frozen=True)
class MaskedAttention:
    """One attention with its cache, and its mask."""

    grouped: Grouped
    mask: CausalMask


def read(node: ir.Node) -> MaskedAttention:
    """What an Attention and the nodes around it compute; raises Refused."""
    mask = read_mask_input(node)
    return MaskedAttention(read_grouped(node, read_concatenated, SIZE_STEP), read_mask(mask))


def rewrite(graph: ir.Graph, found: MaskedAttention) -> None:
    """One node in the place of the cache, the layout and the attention; what depends on no layer is made once."""
    op = Recorder()
    found.grouped.replace_masked(graph, op, *(_shared(found.mask) or _make_shared(op, found)))


def _shared(mask: CausalMask) -> tuple[ir.Value, ...] | None:
    """Bias and lengths that another layer's node reads already, for the same mask."""
    users = [use.node for use in mask.padding.uses() if use.node.op_type == "Or"]
    for step in ("Where", GROUPED):
        users = [use.node for node in users for use in node.outputs[0].uses() if use.node.op_type == step]
    return None if not users else tuple(value for index in (BIAS, SEQLENS, TOTAL) if (value := users[0].inputs[index]) is not None)


def _make_shared(op: Recorder, found: MaskedAttention) -> tuple[ir.Value, ...]:
    """Bias [B, 1, S, T] float, seqlens_k [B] int32 and total_sequence_length int32; T − S is the past's length, whatever its buffer's."""
    mask, linear = found.mask, found.grouped.query.linear
    dtype = linear.dtype
    assert dtype is not None
    (batch, *_, total), (_, new, _) = shape_of(mask.padding), shape_of(linear)

    def made(value: ir.Value, kind: ir.DataType, *shape: Any) -> ir.Value:
        return in_module(value, mask.module, kind, shape)

    def constant(values: Any, kind: ir.DataType, name: str) -> ir.Value:
        return op.initializer(ir.tensor(values, dtype=kind, name=f"{GROUPED}.{name}"))

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
