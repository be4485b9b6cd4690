"""Let ``Attention`` over a static cache mask by lengths (ONNX opset 24); the mask [B, 1, S, C] is no longer computed.

Before:  Attention(query, keys, values, mask, scale=1.0)
         mask = Or(LessOrEqual(slot, row + (lengths − S)), Equal(slot, row + write_indices)),  slot = 0 … C−1, row = 0 … S−1
After:   Attention(query, keys, values, , , , lengths, is_causal=1, scale=1.0)
         keys, values = TensorScatter(past, new, write_indices) [B, K, C, D], graph outputs as before, maybe behind a Reshape that changes nothing

With ``is_causal`` and ``nonpad_kv_seqlen`` row r attends to slot c where c ≤ r + (lengths − S): the first half of the mask. The second half, a
token's own slot, is within the first because the contract of the two graph inputs says lengths = write_indices + S (artifact/io_spec.py).
TensorRT's parser drops the lengths without a word: a build puts them back (engines/backends/static_network.py).
Source:  https://onnx.ai/onnx/operators/onnx__Attention.html (opset 24), onnx__TensorScatter.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleSet

from artifact.io_spec import CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS
from graphs.fusions._reading import Refused, operands, through
from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import Size, axis_read, in_module, module_of, producer, scalar, sizes

MASK = 3
"""Input of Attention."""
PLAIN = {"scale": 1.0}
IN_SLOTS = {"axis": -2, "mode": "linear"}
"""Attributes of a TensorScatter that writes rows of [B, K, C, D] into slots that follow each other; both are ONNX's defaults."""


class FuseStaticAttention(FusionRule):
    """Rules: 1. the cache is written in place; 2. the mask is causal up to the lengths, and beside it allows a token's own slot alone."""

    def pattern(self, op: Any, query: Any, keys: Any, values: Any, mask: Any) -> Any:
        """The mask is read in ``read_lengths``: all layers share it, and it dies with its last user."""
        return op.Attention(query, keys, values, mask, _outputs=["attended"])

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """What lengths would compute differently, and what TensorRT can't write in place."""
        if _attributes(matched["attended"]) != PLAIN:
            yield "attention has other attributes than scale = 1", matched["attended"]
        for cache in (matched["keys"], matched["values"]):
            reason = not_in_place(cache)
            if reason:
                yield reason, cache
        try:
            read_lengths(**matched)
        except Refused as refused:
            yield str(refused), matched["mask"]

    def rewrite(self, op: Any, **matched: ir.Value) -> ir.Value:
        """The same node, with lengths where the mask was."""
        cache = (matched["keys"], matched["values"])
        attended = op.Attention(matched["query"], *cache, None, None, None, read_lengths(**matched), is_causal=1, **PLAIN)
        return in_module(attended, module_of(matched["attended"]))


def read_lengths(query: ir.Value, keys: ir.Value, mask: ir.Value, **_: ir.Value) -> ir.Value:
    """The graph input [B] up to which a mask allows slots: ``slots_allowed`` of exporter/static_cache.py, read backwards.

    Raises:
        Refused: it allows something else.
    """
    query_sizes, keys_sizes = sizes(query), sizes(keys)
    if query_sizes is None or keys_sizes is None:
        raise Refused("the shapes of query and keys are not known")
    (batch, new), capacity = query_sizes[::2], keys_sizes[2]
    if sizes(mask) != (batch, 1, new, capacity):
        raise Refused("the mask is not [B, 1, S, C]")
    halves = operands(mask, "Or") or (None, None)
    causal, own = operands(halves[0], "LessOrEqual"), operands(halves[1], "Equal")
    if causal is None or own is None:
        raise Refused("the mask is not Or(LessOrEqual, Equal): slots up to a token, or its own")
    if not _counts(causal[0], capacity) or not _counts(own[0], capacity):
        raise Refused("the mask does not count the slots 0 … C−1 of the cache")
    last, first = (_behind_rows(rows, batch, new) for rows in (causal[1], own[1]))
    lengths, subtracted = operands(last, "Sub") or (None, None)
    if not is_input(lengths, KEY_VALUE_LENGTHS) or _size_read(subtracted) != new:
        raise Refused(f"the mask is not causal up to {KEY_VALUE_LENGTHS} − S")
    if not is_input(first, CACHE_WRITE_INDICES):
        raise Refused(f"beside the slots up to a token the mask allows others than its own, from {CACHE_WRITE_INDICES}")
    assert lengths is not None
    return lengths


def _behind_rows(rows: ir.Value, batch: Size, new: Size) -> ir.Value:
    """What is added to the rows 0 … S−1 in a sum [B, 1, S, 1]: one number a row of the batch."""
    added = operands(rows, "Add")
    if added is None or sizes(rows) != (batch, 1, new, 1) or not _counts(through(added[0], "Unsqueeze"), new):
        raise Refused("the mask does not count the new tokens 0 … S−1 from a start of each row")
    return through(added[1], "Unsqueeze")


def _counts(value: ir.Value, axis: Size) -> bool:
    """Whether a value is 0, 1, … up to the size of a named axis."""
    counted = operands(value, "Range")
    if counted is None or axis is None:
        return False
    start, limit, step = counted
    return (scalar(start), scalar(step)) == (0, 1) and _size_read(limit) == axis


def _size_read(value: ir.Value | None) -> Size:
    """The axis whose size a scalar is."""
    squeeze = producer(value, "Squeeze")
    return axis_read(squeeze.inputs[0]) if squeeze is not None else None


def not_in_place(cache: ir.Value) -> str:
    """Why keys or values are not a graph input, written at the write indices and given out again; "" where they are."""
    scatter = producer(through(cache, "Reshape"), "TensorScatter")
    if scatter is None:
        return "keys or values are no cache that TensorScatter writes into"
    if IN_SLOTS | _attributes(scatter.outputs[0]) != IN_SLOTS:
        return "TensorScatter does not write into slots that follow each other (axis -2, mode linear)"
    past, _, indices = (*scatter.inputs, None)[:3]
    if not is_input(past) or not scatter.outputs[0].is_graph_output():
        return "the cache is not written in place: it is no graph input, or the written one no graph output"
    return "" if is_input(indices, CACHE_WRITE_INDICES) else f"the cache is not written from {CACHE_WRITE_INDICES} on"


def _attributes(value: ir.Value) -> dict[str, Any]:
    """Attributes of the node that computes a value."""
    node = value.producer()
    return {} if node is None else {name: attribute.value for name, attribute in node.attributes.items()}


def is_input(value: ir.Value | None, name: str | None = None) -> bool:
    """Whether a value is an input of the graph, of this name if one is given."""
    return value is not None and value.is_graph_input() and name in (None, value.name)


def is_candidate(node: ir.Node) -> bool:
    """Every attention with a mask."""
    return node.op_type == "Attention" and len(node.inputs) > MASK and node.inputs[MASK] is not None


RULES = RewriteRuleSet([FuseStaticAttention.rule()])
