"""Pack the query, key and value projections in front of a ``GroupQueryAttention`` that rotates them itself.

Before:  x ─ MatMul(Transpose(w [n·D, E])) three times, n = H, K, K;  GroupQueryAttention(q, k, v, …, do_rotary=1)
After:   x ─ MatMul(Transpose(qkv [(H+2K)·D, E]));  GroupQueryAttention(qkv, –, –, …, do_rotary=1)
         With biases [n·D] each MatMul is followed by an Add before, and the packed one by an Add of [(H+2K)·D] after.
Source:  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, Recorder, place
from graphs.fusions._grouped_heads import GROUPED
from graphs.fusions._packing import Projections, read_projections
from graphs.fusions.pack_qkv import PACKED_NAME

PARTS = ("query", "key", "value")


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
    return GroupedProjections(node, read_projections(dict(zip(PARTS, node.inputs, strict=False)), PACKED_NAME))


def rewrite(graph: ir.Graph, found: GroupedProjections) -> None:
    """The packed linear is the attention's one input."""
    op, attention = Recorder(), found.attention
    linear = found.projections.packed(op, PACKED_NAME)
    place(graph, attention, op, [])
    for index, operand in enumerate((linear, None, None)):
        attention.replace_input_with(index, operand)
