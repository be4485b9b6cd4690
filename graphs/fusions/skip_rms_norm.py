"""Fuse a residual sum and the norm behind it into one ``SkipSimplifiedLayerNormalization`` of ONNX Runtime.

Before:  sum = Add(x, y);  RMSNormalization(sum, weight, axis=-1, epsilon)
After:   SkipSimplifiedLayerNormalization(x, y, weight, epsilon) → normed, –, –, sum

The sum that ends a layer is computed by the norm that begins the next one: graphs/partition.py parts the two where it cuts between layers.
Source:  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, Recorder, place
from graphs.fusions._reading import Refused
from graphs.fusions._values import in_module, is_last_axis, module_of, producer, rank, sizes

N_OUTPUTS, HIDDEN_RANK = 4, 3


@dataclass(frozen=True)
class ResidualNorm:
    """A norm and the sum it reads."""

    norm: ir.Node
    total: ir.Node


def is_candidate(node: ir.Node) -> bool:
    """Every norm of a sum."""
    return node.op_type == "RMSNormalization" and producer(node.inputs[0], "Add") is not None


def read(node: ir.Node) -> ResidualNorm:
    """The norm and its sum; raises Refused."""
    total = producer(node.inputs[0], "Add")
    assert total is not None
    shapes = [sizes(value) for value in total.inputs]
    if rank(total.outputs[0]) != HIDDEN_RANK or shapes[0] != shapes[1]:
        raise Refused(f"the sum is of {shapes[0]} and {shapes[1]}, not of two hidden states [B, S, E]")
    if not is_last_axis(node.attributes.get_int("axis", -1), node.inputs[0]):
        raise Refused("the norm is not over the last axis")
    if node.attributes.get_int("stash_type", 1) != int(ir.DataType.FLOAT):
        raise Refused("the norm does not compute in FLOAT")
    return ResidualNorm(node, total)


def rewrite(graph: ir.Graph, found: ResidualNorm) -> None:
    """One node in the place of the norm."""
    op, norm, total = Recorder(), found.norm, found.total
    normed, summed = norm.outputs[0], total.outputs[0]
    new_normed, *unused, new_sum = op.SkipSimplifiedLayerNormalization(
        *(*total.inputs, norm.inputs[1]), epsilon=norm.attributes.get_float("epsilon", 1e-5), _domain=CONTRIB, _outputs=N_OUTPUTS
    )
    in_module(new_normed, module_of(normed))
    for value in unused:
        value.name = ""
    place(graph, norm, op, [(normed, new_normed), (summed, new_sum)])
