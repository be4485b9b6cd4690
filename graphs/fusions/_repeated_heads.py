"""Keys and values whose heads are repeated for the queries that share them, as exporters write it, and what they are before.

Each head is repeated, (0, 0, 1, 1): on a new axis by Unsqueeze(2) ─ Expand | Tile | Concat ─ Reshape, or by Gather(0, 0, 1, 1) on the axis of the
heads. Heads that are tiled, (0, 1, 0, 1), have the same shapes and another meaning, and are refused.
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.fusions._reading import Refused, first, shape_of
from graphs.fusions._values import numbers, producer

HEADS_RANK = 4
REPEATS = ("Expand", "Tile", "Concat")
TILED = "heads are tiled (0, 1, 0, 1), not repeated on a new axis behind their own (0, 0, 1, 1)"


def unrepeated(value: ir.Value) -> ir.Value:
    """What a key or value [B, H, T, D] is before each head is repeated: [B, K, T, D]; the value itself if none is. Raises Refused otherwise."""
    node = value.producer()
    if node is None or len(shape_of(value)) != HEADS_RANK:
        return value
    source = first(node)
    heads, repeated_heads = shape_of(source)[1:2], shape_of(value)[1]
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1:
        return _each_gathered(source, numbers(node.inputs[1]))
    if node.op_type in REPEATS and heads not in ((repeated_heads,), (1,)):
        raise Refused(TILED)
    repeat = source.producer()
    if node.op_type != "Reshape" or repeat is None or repeat.op_type not in REPEATS:
        return value
    return _each_on_a_new_axis(repeat, shape_of(source), shape_of(value))


def _each_gathered(source: ir.Value, heads: tuple[float | int, ...] | None) -> ir.Value:
    n_heads = shape_of(source)[1]
    if heads is None or not isinstance(n_heads, int) or heads != tuple(head * n_heads // len(heads) for head in range(len(heads))):
        raise Refused(f"heads {heads} of {n_heads} are gathered: not each one as often as the others, one after the other")
    return source


def _each_on_a_new_axis(repeat: ir.Node, repeated: tuple[object, ...], joined: tuple[object, ...]) -> ir.Value:
    """[B, K, T, D] → [B, K, 1, T, D] → [B, K, G, T, D] → [B, H, T, D]."""
    unsqueeze = producer(repeat.inputs[0], "Unsqueeze")
    if unsqueeze is None or len(set(repeat.inputs if repeat.op_type == "Concat" else ())) > 1:
        raise Refused("heads are repeated, but not on a new axis")
    source = first(unsqueeze)
    shape = shape_of(source)
    if None in (*shape, *joined, *repeated):
        raise Refused("the shapes of the repeated heads are not known")
    if shape_of(first(repeat)) != (*shape[:2], 1, *shape[2:]):
        raise Refused(TILED)
    counts = [count for count in (shape[1], repeated[2], joined[1]) if isinstance(count, int)]
    if len(counts) < 3 or counts[2] != counts[0] * counts[1] or joined != (shape[0], counts[2], *shape[2:]):
        raise Refused(f"heads {list(shape)} are repeated to {list(repeated)} and {list(joined)}: more than the heads changes")
    return source
