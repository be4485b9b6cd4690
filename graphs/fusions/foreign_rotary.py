"""Fuse a rotation by position as other exporters write it into one ``RotaryEmbedding`` node (ONNX opset 23).

Before:  x·cos + Concat(−x2, x1)·sin                          x1, x2 = halves of x [B, H, S, D] by Slice or Split; cos, sin [B, 1, S, D]
         or Concat(x1·cos − x2·sin, x2·cos + x1·sin)           cos, sin [B, 1, S, D/2]
After:   x ─ RotaryEmbedding(cos [B, S, D/2], sin, interleaved=0)

Cosine and sine keep the way they are computed (a table read by position, or angles = position · inverse frequency), but once for all layers, and
without the second half, which repeats the first. So no limit on positions comes in that the graph does not have.
Source:  https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; RoFormer, arXiv:2104.09864
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs.fusions._reading import Refused, Tape, operands, other, user
from graphs.fusions._values import is_last_axis, last_size, numbers, producer, rank, scalar, sizes

HEADS_RANK = 4
ELEMENTWISE = ("Cos", "Sin", "Cast", "Mul", "Div")
LARGEST_TABLE_BYTES = 256 * 2**20
"""Tables of cosines are read to see that their halves are equal: 256 MiB are a million positions of 128 · float16."""


@dataclass(frozen=True)
class Rotation:
    """``x`` rotated by the angles behind ``cos`` and ``sin`` [B, 1, S, D] or [B, 1, S, D/2]; ``rotated`` is the result."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    rotated: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Halves joined on the last axis of [B, H, S, D]; or every second element taken, which is the interleaved layout."""
    output = node.outputs[0] if node.outputs else None
    if rank(output) != HEADS_RANK:
        return False
    if node.op_type == "Slice":
        steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else None
        return steps == (2,)
    joins_last = node.op_type == "Concat" and len(node.inputs) == 2 and is_last_axis(node.attributes.get_int("axis", 0), output)
    return joins_last and all(producer(half, "Neg") or producer(half, "Sub") for half in node.inputs[:1])


def read(node: ir.Node) -> Rotation:
    """The rotation around a join of halves; raises Refused."""
    if node.op_type == "Slice":
        raise Refused("it takes every second element: interleaved pairs, as in Meta's checkpoints; halves are expected")
    found = _whole(node) if producer(node.inputs[0], "Neg") is not None else _by_halves(node)
    heads, angles = sizes(found.x), sizes(found.cos)
    assert heads is not None
    assert isinstance(heads[3], int)  # two halves were found
    alike = angles is not None and angles == sizes(found.sin) and len(angles) == HEADS_RANK and None not in angles
    if angles is None or not alike or angles[1:3] != (1, heads[2]) or angles[0] not in (1, heads[0]):
        raise Refused(f"cosine and sine are {angles} and {sizes(found.sin)}; expected [B, 1, S, D] for heads {heads}")
    for value in (found.cos, found.sin):
        if last_size(value) == heads[3]:
            _check_equal_halves(_angles(value))
        elif last_size(value) != heads[3] // 2:
            raise Refused(f"cosine and sine have {last_size(value)} columns for head_dim {heads[3]}")
    return found


def rewrite(graph: ir.Graph, found: Rotation) -> None:
    """One node; cosine and sine [B, S, D/2] are computed as they were, without their second half."""
    tape, half = Tape(graph, found.rotated), int(last_size(found.x) or 0) // 2
    tables = [_per_sequence(tape, _flat(tape, _half(tape, _angles(value), half)), found.x) for value in (found.cos, found.sin)]
    tape.add("RotaryEmbedding", found.x, *tables, interleaved=0)
    tape.finish()


def _whole(join: ir.Node) -> Rotation:
    """x·cos + Concat(−x2, x1)·sin."""
    turned = join.outputs[0]
    by_sin = user(turned, "Mul")
    added = user(by_sin.outputs[0], "Add") if by_sin is not None else None
    straight = other(added, by_sin.outputs[0]) if added is not None and by_sin is not None else None
    by_cos = operands(straight, "Mul")
    if by_sin is None or added is None or by_cos is None:
        raise Refused("the turned halves are not multiplied by a sine and added to a product with a cosine")
    x = _source(join.inputs[1], 0)
    if _source((operands(join.inputs[0], "Neg") or (None,))[0], 1) is not x:
        raise Refused("the two halves are not of one value")
    if not any(one is x for one in by_cos):
        raise Refused("the cosine does not multiply what is turned")
    sin, cos = other(by_sin, turned), by_cos[1] if by_cos[0] is x else by_cos[0]
    assert sin is not None
    return Rotation(x, cos, sin, added.outputs[0])


def _by_halves(join: ir.Node) -> Rotation:
    """Concat(x1·cos − x2·sin, x2·cos + x1·sin)."""
    difference, total = operands(join.inputs[0], "Sub") or (), operands(join.inputs[1], "Add") or ()
    pairs = [_half_and_angle(value) for value in (*difference, *total)]
    if len(pairs) != 4:
        raise Refused("the halves are not a difference and a sum of products")
    (first, cos), (second, sin), *summed = pairs
    if {(half, angle) for half, angle in summed} != {(second, cos), (first, sin)}:
        raise Refused("the second half is not x2·cos + x1·sin")
    x = _source(first, 0)
    if _source(second, 1) is not x:
        raise Refused("the two halves are not of one value")
    return Rotation(x, cos, sin, join.outputs[0])


def _half_and_angle(product: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The factors of a product, the half of the heads first."""
    first, second = operands(product, "Mul") or (product, product)
    if first is second:
        raise Refused("the halves are not a difference and a sum of products")
    return (first, second) if producer(first, "Split") or producer(first, "Slice") else (second, first)


def _source(half: ir.Value | None, index: int) -> ir.Value:
    """What a half (0: the first, 1: the second) of the last axis is taken from."""
    node = half.producer() if half is not None else None
    source = node.inputs[0] if node is not None and node.op_type in ("Slice", "Split") else None
    if node is None or half is None or source is None:
        raise Refused("a half is neither a Slice nor a Split")
    whole, part = last_size(source), last_size(half)
    if not isinstance(whole, int) or not isinstance(part, int) or part * 2 != whole:
        raise Refused(f"{part} of {whole} elements are turned: a part of the head, not its halves")
    if node.op_type == "Split":
        if not is_last_axis(node.attributes.get_int("axis", 0), source) or node.outputs[index] is not half or len(node.outputs) != 2:
            raise Refused("the halves are swapped, or not of the last axis")
        return source
    starts, axes = numbers(node.inputs[1]), numbers(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or len(axes) != 1 or not is_last_axis(axes[0], source) or starts not in ((index * part,), (index * part - whole,)):
        raise Refused("the halves are swapped, or not of the last axis")
    return source


def _angles(value: ir.Value) -> ir.Value:
    """[B, S, ·] of a cosine or sine [B, 1, S, ·]; the value itself where no axis was put in."""
    node = producer(value, "Unsqueeze")
    source = node.inputs[0] if node is not None and numbers(node.inputs[1]) in ((1,), (-3,)) else None
    return value if source is None else source


def _check_equal_halves(value: ir.Value) -> None:
    """Raise Refused if the second half of the last axis may differ from the first."""
    node = value.producer()
    if node is not None and _keeps_halves(node) and node.inputs[0] is not None:
        _check_equal_halves(node.inputs[0])
    elif node is None or not (
        _is_doubling(node) or (node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 and _is_twice(node.inputs[0]))
    ):
        origin = "an input" if node is None else node.op_type
        raise Refused(f"the halves of cosine or sine are not known to be equal: they come from {origin}")


def _keeps_halves(node: ir.Node) -> bool:
    """Whether each half of a node's output is computed from that half of its input, by itself."""
    if node.op_type == "Unsqueeze":
        return numbers(node.inputs[1]) in ((0,), (1,))
    return node.op_type in ELEMENTWISE and all(scalar(one) is not None for one in node.inputs[1:])


def _is_doubling(node: ir.Node) -> bool:
    return (
        node.op_type == "Concat"
        and len(node.inputs) == 2
        and node.inputs[0] is node.inputs[1]
        and is_last_axis(node.attributes.get_int("axis"), node.outputs[0])
    )


def _is_twice(table: ir.Value | None) -> bool:
    """Whether a constant table's columns are one half, twice."""
    tensor = table.const_value if table is not None and rank(table) == 2 else None
    if tensor is None or tensor.nbytes > LARGEST_TABLE_BYTES:
        return False
    elements = tensor.numpy()
    half = elements.shape[1] // 2
    return bool(np.array_equal(elements[:, :half], elements[:, half:]))


def _flat(tape: Tape, value: ir.Value) -> ir.Value:
    """[B, S, D/2] of a cosine or sine that may still have an axis for the heads."""
    shape = sizes(value) or ()
    return tape.add("Squeeze", value, [1], like=value, shape=(shape[0], *shape[2:])) if len(shape) == HEADS_RANK else value


def _per_sequence(tape: Tape, value: ir.Value, x: ir.Value) -> ir.Value:
    """[B, S, D/2] of what may be the same for all sequences, [1, S, D/2]; the batch is read from an input, so that all layers read it once."""
    batch = (sizes(x) or (None,))[0]
    if batch in (1, (sizes(value) or (None,))[0]):
        return value
    fed = next((fed for fed in tape.graph.inputs if (sizes(fed) or (None,))[0] == batch), x)
    shape = tape.add("Concat", tape.add("Shape", fed, start=0, end=1), [1, 1], axis=0)
    return tape.add("Expand", value, shape, like=value)


def _half(tape: Tape, value: ir.Value, half: int) -> ir.Value:
    """The first half of the last axis of a cosine or sine, computed as the whole is."""
    node = value.producer()
    if last_size(value) == half or node is None:
        return value
    source, shape = node.inputs[0], (*(sizes(value) or ())[:-1], half)
    assert source is not None
    if _is_doubling(node):
        return source
    if _keeps_halves(node):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return tape.add(node.op_type, _half(tape, source, half), *node.inputs[1:], like=value, shape=shape, **attributes)
    return tape.add("Slice", value, [0], [half], [-1], like=value, shape=shape)
