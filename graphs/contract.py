"""What a pass may rely on, and what it leaves behind: claims about a graph, in words and as a check that names the node at which one fails.

A claim is checked over every node, so it holds of what a pass made and of what was there before. No weight is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from artifact.errors import FusionError
from graphs.fusions._values import SMALL_CONSTANT, is_last_axis, numbers, producer, rank, sizes
from graphs.fusions.accumulate import is_candidate

FUSED_OPSET, HEADS_RANK = 23, 4
MASK, PAST, NONPAD = 3, slice(4, 6), 6
"""Inputs of Attention."""


@dataclass(frozen=True)
class Claim:
    """What holds of a graph.

    Attributes:
        words: the claim, as a sentence.
        broken_at: name of the first node at which it fails; None where it holds.
    """

    words: str
    broken_at: Callable[[ir.Model], str | None]


def every(words: str, holds: Callable[[ir.Node], bool], *op_types: str) -> Claim:
    """A claim about each node, or each node of some operators of the standard domain."""

    def broken_at(model: ir.Model) -> str | None:
        nodes = (node for node in model.graph if not op_types or (node.op_type in op_types and node.domain == ""))
        return next((node.name or node.op_type for node in nodes if not holds(node)), None)

    return Claim(words, broken_at)


def check_claims(claims: tuple[Claim, ...], model: ir.Model, fusion: str, verb: str) -> None:
    """Hold a graph against claims.

    Args:
        claims: what must hold.
        model: the graph.
        fusion: name of the pass, for the message.
        verb: ``requires`` before the pass, ``ensures`` after it.

    Raises:
        FusionError: the first claim that fails, the pass and the node.
    """
    for claim in claims:
        node = claim.broken_at(model)
        if node is not None:
            raise FusionError(f"fusion {fusion} {verb} that {claim.words}; this fails at {node}")


def _opset(model: ir.Model) -> str | None:
    version = model.opset_imports.get("", 0)
    return None if version >= FUSED_OPSET else f"opset {version}"


def _is_connected(node: ir.Node) -> bool:
    """Whether every operand is an input, an initializer or computed by a node of the same graph."""
    operands = [value for value in node.inputs if value is not None]
    return all(value.is_graph_input() or value.is_initializer() or _computed_in(node.graph, value) for value in operands)


def _computed_in(graph: object, value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.graph is graph


def _is_float32_norm(node: ir.Node) -> bool:
    last = is_last_axis(node.attributes.get_int("axis", -1), node.inputs[0])
    return last and rank(node.inputs[1]) == 1 and node.attributes.get_int("stash_type", 1) == int(ir.DataType.FLOAT)


def _rotates_by_own_dtype(node: ir.Node) -> bool:
    x, *tables = (value for value in node.inputs[:3] if value is not None)
    return all(table.dtype in (None, x.dtype) for table in tables)


def _is_half_split_rotation(node: ir.Node) -> bool:
    return _rotates_by_own_dtype(node) and node.attributes.get_int("interleaved", 0) == 0


def _is_plain_attention(node: ir.Node) -> bool:
    has_past = any(value is not None for value in node.inputs[PAST])
    return node.attributes.get_float("scale", 0.0) == 1.0 and len(node.outputs) == 1 and not has_past and "softcap" not in node.attributes


def _has_boolean_mask(node: ir.Node) -> bool:
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    return mask is None or mask.dtype in (None, ir.DataType.BOOL)


def _is_masked_by_lengths(node: ir.Node) -> bool:
    """Whether attention is causal up to lengths, and has no mask beside them."""
    mask, lengths = (node.inputs[at] if len(node.inputs) > at else None for at in (MASK, NONPAD))
    return mask is None and lengths is not None and node.attributes.get_int("is_causal", 0) == 1


def _reads_unrepeated_heads(node: ir.Node) -> bool:
    return not any(_is_repeated(value) for value in node.inputs[1:3])


def _is_repeated(value: ir.Value | None) -> bool:
    """Whether a key or value is each head written out several times."""
    reshape = producer(value, "Reshape")
    return producer(reshape.inputs[0] if reshape is not None else value, "Expand") is not None


def _has_constant_shape(node: ir.Node) -> bool:
    shape = numbers(node.inputs[1])
    return shape is not None and (0 not in shape or node.attributes.get_int("allowzero", 0) == 0)


def _is_not_of_a_linear(node: ir.Node) -> bool:
    """Whether a Split is on another axis than a linear's outputs."""
    x = node.inputs[0]
    added = producer(x, "Add")
    linear = any(producer(value, "MatMul") is not None for value in (x, *(added.inputs if added is not None else ())))
    return not linear or not is_last_axis(node.attributes.get_int("axis", 0), x)


def _stores_weights_outside(node: ir.Node) -> bool:
    """Whether no linear's weight lies in the graph's own file; what is computed, or a small matrix, is none."""
    turned = producer(node.inputs[1], "Transpose")
    weight = turned.inputs[0] if turned is not None else node.inputs[1]
    tensor = weight.const_value if weight is not None else None
    return tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size <= SMALL_CONSTANT


def _adds_up_in_float32(node: ir.Node) -> bool:
    return not is_candidate(node)


OPSET_23 = Claim("the graph is of opset 23 or later", _opset)
CONNECTED = every("every operand is an input, an initializer or another node's", _is_connected)
TYPED = every("every value has a dtype and a shape", lambda node: all(value.dtype and sizes(value) is not None for value in node.outputs))
NORMS_IN_FLOAT32 = every("a norm is over the last axis, weighted, and computes in float32", _is_float32_norm, "RMSNormalization")
ROTATIONS_BY_TABLE = every("a rotation is of halves, by tables of the dtype of what it rotates", _is_half_split_rotation, "RotaryEmbedding")
ROTATIONS_TYPED = every("a rotation, of halves or of pairs, is by tables of the dtype of what it rotates", _rotates_by_own_dtype, "RotaryEmbedding")
ATTENTION_PLAIN = every("attention has scale 1, no past, no softcap and one output", _is_plain_attention, "Attention")
MASKS_BOOLEAN = every("attention has a boolean mask or none", _has_boolean_mask, "Attention")
MASKED_BY_LENGTHS = every("attention is causal up to lengths, without a mask", _is_masked_by_lengths, "Attention")
HEADS_UNREPEATED = every("attention reads keys and values that are not repeated", _reads_unrepeated_heads, "Attention")
SHAPES_CONSTANT = every("a Reshape has a constant shape, in which 0 means the input's own size", _has_constant_shape, "Reshape")
LINEARS_UNSLICED = every("no linear is split on its last axis", _is_not_of_a_linear, "Split")
WEIGHTS_OUTSIDE = every("a linear's weight is stored outside the graph", _stores_weights_outside, "MatMul")
SUMS_IN_FLOAT32 = every("a linear by a stored weight adds up in float32", _adds_up_in_float32, "MatMul", "Gemm")
