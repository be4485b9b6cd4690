"""Attention that is masked by lengths, as a graph says it: what TensorRT's parser drops without a word, and a build must put back.

The parser reads ``Attention(is_causal=1)`` as a causal mask aligned to the upper left of [S, C], and leaves ``nonpad_kv_seqlen`` out: a prefill of a
whole prompt is still right, and every step after it attends to the wrong slots. A plan of such a network looks sound.
Source: https://onnx.ai/onnx/operators/onnx__Attention.html (opset 24); "Unused Input" in the log of TensorRT-RTX 1.7.1's parser
"""

from __future__ import annotations

import onnx_ir as ir

from artifact.errors import EngineError
from engines.graph_weights import node_label

MASK, LENGTHS = 3, 6
"""Inputs of Attention: a mask, and lengths [B] int64 up to which keys are in use."""


def lengths_by_attention(graph: ir.Graph) -> dict[str, str]:
    """Label of each Attention node that lengths mask → the graph input that holds them.

    Raises:
        EngineError: lengths that a network can't be given: computed ones, beside a mask, without ``is_causal``, or of nodes of one name.
    """
    found: dict[str, str] = {}
    for node in graph:
        lengths = node.inputs[LENGTHS] if node.op_type == "Attention" and node.domain == "" and len(node.inputs) > LENGTHS else None
        if lengths is None:
            continue
        label, reason = node_label(node), _refusal(node, lengths)
        if label in found:
            reason = "another node has its name"
        if reason:
            raise EngineError(
                f"attention {label!r} can't be masked by lengths in TensorRT: {reason}", hint="fuse again: python cli.py fuse ART --force"
            )
        found[label] = str(lengths.name)
    return found


def _refusal(node: ir.Node, lengths: ir.Value) -> str:
    if not lengths.is_graph_input() or lengths.dtype != ir.DataType.INT64:
        return f"{lengths.name!r} is no graph input of int64"
    if node.inputs[MASK] is not None:
        return "it has a mask beside the lengths"
    if node.attributes.get_int("is_causal", 0) != 1:
        return "it is not causal, so that new tokens would see each other whole"
    return ""
