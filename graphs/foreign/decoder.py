"""The shape of a decoder, read from its graph: how many layers, heads, and how wide; or which part of a decoder was not found."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import onnx_ir as ir

from artifact.errors import FusionError
from graphs.fusions import foreign_attention
from graphs.fusions._reading import Refused, through
from graphs.fusions._repeated_heads import unrepeated
from graphs.fusions._values import last_size, rank, sizes

HEADS_RANK = 4


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder, in Hugging Face's words."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int

    def as_json(self) -> dict[str, int]:
        """For the report."""
        return asdict(self)


def fused_by_others(model: ir.Model) -> str | None:
    """The attention operator of another domain that a graph holds: whoever made it has fused it already. None if there is none."""
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") and "Attention" in node.op_type:
            return f"{node.domain}::{node.op_type}"
    return None


def read_decoder(model: ir.Model) -> DecoderShape:
    """The shape of a prepared graph's decoder.

    Raises:
        FusionError: no decoder; with the part that was not found, or the two layers that differ.
    """
    vocab_size, hidden_size = _embedding(model)
    heads = _heads(model)
    intermediate = _feed_forward(model, len(heads))
    if not any(rank(value) in (2, 3) and last_size(value) == vocab_size for value in model.graph.outputs):
        raise FusionError(f"no decoder: no logits, an output [B, S, {vocab_size}], were found")
    n_heads, n_kv_heads, head_dim = heads[0]
    return DecoderShape(len(heads), n_heads, n_kv_heads, head_dim, hidden_size, intermediate, vocab_size)


def find_embedding(model: ir.Model) -> tuple[int, int] | None:
    """[V, E] of the table that the token ids read; None where no such table is seen."""
    for node in model.graph:
        table, ids = node.inputs if node.op_type == "Gather" else (None, None)
        shape = sizes(table) if table is not None and table.is_initializer() else None
        if shape is None or ids is None or len(shape) != 2 or node.attributes.get_int("axis", 0) != 0:
            continue
        if through(ids, "Cast", "Reshape").is_graph_input() and "position" not in (through(ids, "Cast", "Reshape").name or ""):
            vocab_size, hidden_size = shape
            if isinstance(vocab_size, int) and isinstance(hidden_size, int):
                return vocab_size, hidden_size
    return None


def _embedding(model: ir.Model) -> tuple[int, int]:
    if (found := find_embedding(model)) is not None:
        return found
    raise FusionError("no decoder: no token embedding, a Gather from a constant [V, E] by integers that are fed, was found")


def _heads(model: ir.Model) -> list[tuple[int, int, int]]:
    """(query heads, key heads, head_dim) of every layer, all alike."""
    found = [heads for node in model.graph if (heads := _heads_of(node)) is not None]
    if not found:
        raise FusionError("no decoder: no attention, a soft-max over [B, heads, S, T] or an Attention node on [B, heads, S, D], was found")
    if len(set(found)) > 1:
        first, second = list(dict.fromkeys(found))[:2]
        raise FusionError(f"no decoder: layers differ in (query heads, key heads, head_dim): {first} and {second}")
    return found


def _heads_of(node: ir.Node) -> tuple[int, int, int] | None:
    """Heads of one attention, written as a soft-max or as one node."""
    query, value = None, None
    if node.op_type == "Attention" and node.domain == "":
        query, value = node.inputs[0], node.inputs[2]
    elif node.op_type == "Softmax" and rank(node.outputs[0]) == HEADS_RANK:
        query = node.outputs[0]
        try:
            value = foreign_attention.before_widening(foreign_attention.product_with_values(query)[1])
        except Refused:
            return None
    shapes = sizes(query), sizes(_before_repetition(value))
    if shapes[0] is None or shapes[1] is None or not len(shapes[0]) == len(shapes[1]) == HEADS_RANK:
        return None
    n_heads, n_kv_heads, head_dim = shapes[0][1], shapes[1][1], shapes[1][3]
    if isinstance(n_heads, int) and isinstance(n_kv_heads, int) and isinstance(head_dim, int):
        return n_heads, n_kv_heads, head_dim
    return None


def _before_repetition(value: ir.Value | None) -> ir.Value | None:
    try:
        return None if value is None else unrepeated(value)
    except Refused:
        return value


def _feed_forward(model: ir.Model, n_layers: int) -> int:
    """F of the gated feed-forward of every layer: the width of what a Sigmoid (or Swish) gates."""
    widths = [last_size(node.inputs[0]) for node in model.graph if node.op_type in ("Sigmoid", "Swish") and rank(node.inputs[0]) == 3]
    if len(widths) != n_layers or len(set(widths)) != 1 or not isinstance(widths[0], int):
        raise FusionError(
            "no decoder: the gated feed-forward, one Sigmoid over [B, S, F] a layer, "
            f"was found {len(widths)} times in {n_layers} layers, F = {widths[:2]}"
        )
    return widths[0]
