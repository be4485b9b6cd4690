"""Cosine and sine of a rotation: that each angle stands twice in their last axis, and the same computation with each angle once.

Twice: the second half repeats the first, or (in pairs) every odd element repeats the even one before it; by Concat(a, a), by Unsqueeze(-1) ─ Expand
─ Reshape, or in a constant table. Behind that only nodes are passed that compute each element from its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.fusions._reading import Refused, Tape, constants, first, op_of, shape_of
from graphs.fusions._values import is_last_axis, last_size, node_of, producer, scalar

ELEMENTWISE = ("Cos", "Sin", "Cast", "Mul", "Div")
REPEATS = ("Expand", "Tile", "Concat")
MOVES = ("Unsqueeze", "Squeeze", "Gather", "Slice")
TABLE_RANK = 2
LARGEST_TABLE_BYTES = 256 * 2**20
"""Tables of cosines are read to see that each angle stands twice: 256 MiB are a million positions of 128 · float16."""


def check_twice(value: ir.Value, paired: bool) -> None:
    """Raise Refused if an angle may not stand twice in the last axis of a cosine or sine."""
    while (node := value.producer()) is not None and _keeps_columns(node):
        value = first(node)
    if _doubled(value, paired) is None and not _is_twice(value, paired):
        origin = "an input" if node is None else node.op_type
        raise Refused(f"the halves of cosine or sine are not known to be equal: they come from {origin}")


def once(tape: Tape, value: ir.Value, n_angles: int, paired: bool, by_position: bool = False) -> ir.Value:
    """A cosine or sine whose last axis holds each angle once, computed as the whole is; ``check_twice`` has passed it.

    Of a table [positions, D] that is read ``by_position`` all rows are kept: layers leave out those behind their own caches, and would not share it.
    """
    node, source = value.producer(), _doubled(value, paired)
    if last_size(value) == n_angles:
        return value
    if source is not None:
        return source
    if node is None:
        end, step = (last_size(value), 2) if paired else (n_angles, 1)
        assert isinstance(end, int)
        return tape.add("Slice", value, [0], [end], [-1], [step], like=value, shape=(*shape_of(value)[:-1], n_angles))
    if by_position and node.op_type == "Slice" and constants(node, 1) == (0,) and constants(node, 4, (1,)) == (1,):
        return once(tape, first(node), n_angles, paired, by_position)
    shape = None if by_position else (*shape_of(value)[:-1], n_angles)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    below = once(tape, first(node), n_angles, paired, by_position or (node.op_type == "Gather" and len(shape_of(first(node))) == TABLE_RANK))
    return tape.add(node.op_type, below, *node.inputs[1:], like=value, shape=shape, **attributes)


def _keeps_columns(node: ir.Node) -> bool:
    """Whether each element of the last axis is computed from that element of the first input, by itself."""
    if node.op_type in ELEMENTWISE:
        return all(scalar(one) is not None for one in node.inputs[1:])
    if node.op_type not in MOVES or last_size(node.inputs[0]) != last_size(node.outputs[0]):
        return False
    if node.op_type == "Gather":
        return not is_last_axis(node.attributes.get_int("axis", 0), node.inputs[0])
    axes = constants(node, 3) if node.op_type == "Slice" else ()
    return axes is not None and not any(is_last_axis(axis, node.inputs[0]) for axis in axes)


def _doubled(value: ir.Value, paired: bool) -> ir.Value | None:
    """What a value repeats in its last axis: whole behind whole, or each element behind itself; None if it does not."""
    if not paired:
        return _joined_with_itself(value)
    stacked = first(node_of(value)) if op_of(value) == "Reshape" else value
    repeat = stacked.producer()
    if repeat is None or repeat.op_type not in REPEATS or op_of(first(repeat)) != "Unsqueeze":
        return None
    if repeat.op_type == "Concat" and len(set(repeat.inputs)) > 1:
        return None
    unsqueezed = first(repeat)
    source = first(node_of(unsqueezed))
    shape, n_angles = shape_of(source), last_size(source)
    shapes = shape_of(unsqueezed), shape_of(stacked), shape_of(value)
    return source if isinstance(n_angles, int) and shapes == ((*shape, 1), (*shape, 2), (*shape[:-1], 2 * n_angles)) else None


def _joined_with_itself(value: ir.Value) -> ir.Value | None:
    join = producer(value, "Concat")
    if join is None or len(join.inputs) != 2 or join.inputs[0] is not join.inputs[1] or not is_last_axis(join.attributes.get_int("axis"), value):
        return None
    return first(join)


def _is_twice(table: ir.Value, paired: bool) -> bool:
    """Whether the last axis of a constant table holds each angle twice."""
    tensor = table.const_value
    if tensor is None or tensor.nbytes > LARGEST_TABLE_BYTES:
        return False
    elements = tensor.numpy()
    half = elements.shape[-1] // 2
    angles = (elements[..., 0::2], elements[..., 1::2]) if paired else (elements[..., :half], elements[..., half:])
    return bool(np.array_equal(*angles))
