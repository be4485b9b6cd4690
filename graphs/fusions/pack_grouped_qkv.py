"""Pack the query, key and value projections in front of a ``GroupQueryAttention`` that rotates them itself.

Before:  x ─ MatMul(Transpose(w [n·D, E])) three times, n = H, K, K;  GroupQueryAttention(q, k, v, …, do_rotary=1)
After:   x ─ MatMul(Transpose(qkv [(H+2K)·D, E]));  GroupQueryAttention(qkv, –, –, …, do_rotary=1)
         With biases [n·D] each MatMul is followed by an Add before, and the packed one by an Add of [(H+2K)·D] after.
Source:  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, GROUPED, Recorder
from graphs.fusions._grouped_heads import feed_packed, read_qkv
from graphs.fusions._packing import Projections
from graphs.fusions.pack_qkv import PACKED_NAME


@dataclass(frozen=True)
class GroupedProjections:
    """What query, key and value of an attention are projected from and by."""

    attention: ir.Node
    projections: Projections


def is_candidate(node: ir.Node) -> bool:
    """Every GroupQueryAttention that rotates, and whose key and value come apart from the query."""
    rotates = node.attributes.get_int("do_rotary", 0) == 1
    return node.op_type == GROUPED and node.domain == CONTRIB and rotates and node.inputs[1] is not None


def read(node: ir.Node) -> GroupedProjections:
    """The linears in front of an attention; raises Refused."""
    return GroupedProjections(node, read_qkv(*node.inputs[:3]))


def rewrite(graph: ir.Graph, found: GroupedProjections) -> None:
    """The packed linear is the attention's one input."""
    op = Recorder()
    feed_packed(graph, op, found.attention, found.projections.packed(op, PACKED_NAME))
