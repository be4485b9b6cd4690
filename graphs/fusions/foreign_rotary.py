"""Fuse a rotation by position as other exporters write it into one ``RotaryEmbedding`` node (ONNX opset 23).

Before:  x·cos + Concat(−x2, x1)·sin                          x1, x2 = halves of x [B, H, S, D] by Slice or Split; cos, sin [B, 1, S, D]
         or Concat(x1·cos − x2·sin, x2·cos + x1·sin)           cos, sin [B, 1, S, D/2]
         or either with x1, x2 = even and odd elements (every second one by Slice, or a Reshape to pairs), joined again as pairs
After:   x ─ RotaryEmbedding(cos [B, S, D/2], sin, interleaved=0 | 1)

Cosine and sine keep the way they are computed (a table read by position, or angles = position · inverse frequency), but once for all layers, and
with each angle once (graphs/fusions/_rotary_tables.py). So no limit on positions comes in that the graph does not have.
Source:  https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; RoFormer, arXiv:2104.09864
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._reading import Refused, Tape, constants, first, need, need_user, op_of, other, shape_of, through
from graphs.fusions._rotary_tables import check_twice, once
from graphs.fusions._values import is_last_axis, last_size, producer, rank, sizes

HEADS_RANK, PAIRS_RANK = 4, 5
PARTS = ("Slice", "Split", "Squeeze", "Gather")
NOT_A_PART = "a half is neither a Slice nor a Split of the heads, nor of their pairs"
NOT_TURNED = "the turned halves are not multiplied by a sine and added to a product with a cosine"
NOT_PRODUCTS = "the halves are not a difference and a sum of products"
NOT_ONE = "the two halves are not of one value"
SWAPPED = "the halves are swapped, or not of the last axis"


@dataclass(frozen=True)
class Rotation:
    """``x`` rotated by the angles behind ``cos`` and ``sin`` [B, 1, S, D] or [B, 1, S, D/2]; ``paired``: even and odd elements, not halves."""

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    rotated: ir.Value
    paired: bool


def is_candidate(node: ir.Node) -> bool:
    """Two turned halves joined on the last axis of [B, H, S, D], or on that of pairs [B, H, S, D/2, 2]."""
    if node.op_type != "Concat" or rank(node.outputs[0]) not in (HEADS_RANK, PAIRS_RANK) or len(node.inputs) != 2:
        return False
    return is_last_axis(node.attributes.get_int("axis"), node.outputs[0]) and op_of(through(first(node), "Unsqueeze")) in ("Neg", "Sub")


def read(join: ir.Node) -> Rotation:
    """The rotation around a join of halves; raises Refused."""
    left, right = (through(value, "Unsqueeze") for value in join.inputs if value is not None)
    joined, paired = join.outputs[0], rank(join.outputs[0]) == PAIRS_RANK
    turned = need_user(joined, "Reshape", otherwise="pairs are not joined to heads again").outputs[0] if paired else joined
    if paired and _pairs(turned) != shape_of(joined):
        raise Refused(f"pairs {list(shape_of(joined))} become {list(shape_of(turned))}: not heads again")
    found = _whole(left, right, turned) if op_of(left) == "Neg" else _by_halves(left, right, turned)
    if found.paired != paired:
        raise Refused("halves are joined as pairs, or pairs as halves")
    heads, angles = shape_of(found.x), shape_of(found.cos)
    wanted = [(batch, 1, heads[2], columns) for batch in (1, heads[0]) for columns in (heads[3], last_size(left))]
    if angles not in wanted or angles != shape_of(found.sin) or None in angles:
        raise Refused(
            f"cosine and sine are {sizes(found.cos)} and {sizes(found.sin)}; expected [B, 1, S, D] or [B, 1, S, D/2] for heads {list(heads)}"
        )
    for value in (found.cos, found.sin):
        if angles[3] == heads[3]:
            check_twice(_angles(value), paired)
    return found


def rewrite(graph: ir.Graph, found: Rotation) -> None:
    """One node; cosine and sine [B, S, D/2] are computed as they were, each angle once."""
    tape, head_dim = Tape(graph, found.rotated), last_size(found.x)
    assert isinstance(head_dim, int)
    angles = [once(tape, _angles(value), head_dim // 2, found.paired) for value in (found.cos, found.sin)]
    tables = [_per_sequence(tape, _flat(tape, value), found.x) for value in angles]
    tape.add("RotaryEmbedding", found.x, *tables, interleaved=int(found.paired))
    tape.finish()


def _pairs(heads: ir.Value) -> tuple[object, ...]:
    """Shape [B, H, S, D/2, 2] of heads [B, H, S, D] in pairs."""
    head_dim = last_size(heads)
    return (*shape_of(heads)[:-1], head_dim // 2, 2) if isinstance(head_dim, int) else ()


def _whole(left: ir.Value, right: ir.Value, turned: ir.Value) -> Rotation:
    """x·cos + Concat(−x2, x1)·sin."""
    by_sin = need_user(turned, "Mul", otherwise=NOT_TURNED)
    added = need_user(by_sin.outputs[0], "Add", otherwise=NOT_TURNED)
    by_cos = need(other(added, by_sin.outputs[0]), "Mul", otherwise=NOT_TURNED)
    x, paired = _source(first(need(left, "Neg", otherwise=NOT_TURNED)), 1)
    if _source(right, 0) != (x, paired):
        raise Refused(NOT_ONE)
    cos, sin = other(by_cos, x), other(by_sin, turned)
    assert sin is not None
    if cos is None:
        raise Refused("the cosine does not multiply what is turned")
    return Rotation(x, cos, sin, added.outputs[0], paired)


def _by_halves(left: ir.Value, right: ir.Value, turned: ir.Value) -> Rotation:
    """Concat(x1·cos − x2·sin, x2·cos + x1·sin)."""
    difference, total = (need(value, kind, otherwise=NOT_PRODUCTS) for value, kind in ((left, "Sub"), (right, "Add")))
    (one, cos), (two, sin), *summed = (_half_and_angle(product) for product in (*difference.inputs, *total.inputs))
    if {(half, angle) for half, angle in summed} != {(two, cos), (one, sin)}:
        raise Refused("the second half is not x2·cos + x1·sin")
    x, paired = _source(one, 0)
    if _source(two, 1) != (x, paired):
        raise Refused(NOT_ONE)
    return Rotation(x, cos, sin, turned, paired)


def _half_and_angle(product: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The factors of a product, the half of the heads first."""
    one, two = (value for value in need(product, "Mul", otherwise=NOT_PRODUCTS).inputs if value is not None)
    return (one, two) if op_of(one) in PARTS else (two, one)


def _source(half: ir.Value, index: int) -> tuple[ir.Value, bool]:
    """What a half (0: the first, 1: the second) is taken from [B, H, S, D], and whether it is every second element."""
    part = need(half, *PARTS, otherwise=NOT_A_PART)
    if part.op_type == "Squeeze":
        half = first(part)
        part = need(half, "Slice", "Split", otherwise=NOT_A_PART)
    source, taken = first(part), _taken(part, half)
    if rank(source) == PAIRS_RANK:
        heads = first(need(source, "Reshape", otherwise=NOT_A_PART))
        if taken != (index, 1) or _pairs(heads) != shape_of(source):
            raise Refused(SWAPPED)
        return heads, True
    head_dim, size = last_size(source), last_size(half)
    if not isinstance(head_dim, int) or size != head_dim // 2:
        raise Refused(f"{size} of {head_dim} elements are turned: a part of the head, not its halves")
    if taken not in ((index * (head_dim // 2), 1), (index, 2)):
        raise Refused(SWAPPED)
    return source, taken == (index, 2)


def _taken(part: ir.Node, half: ir.Value) -> tuple[int, int] | None:
    """Where in the last axis a part begins, and in what steps it goes on; None for another axis, or what is computed."""
    source, size, axis = first(part), last_size(half), (part.attributes.get_int("axis", 0),)
    found: tuple[tuple[float, ...] | None, ...]
    if part.op_type == "Slice":
        found = constants(part, 1), constants(part, 3), constants(part, 4, (1,))
    elif part.op_type == "Gather":
        found = constants(part, 1), axis, (1,)
    else:
        found = (part.outputs.index(half) * size,) if isinstance(size, int) else None, axis, (1,)
    whole, known = last_size(source), [one[0] for one in found if one is not None and len(one) == 1]
    if len(known) != len(found) or not is_last_axis(known[1], source) or not isinstance(whole, int):
        return None
    return int(known[0]) % whole, int(known[2])


def _angles(value: ir.Value) -> ir.Value:
    """[B, S, ·] of a cosine or sine [B, 1, S, ·]; the value itself where no axis was put in."""
    node = producer(value, "Unsqueeze")
    shape = shape_of(value)
    return first(node) if node is not None and shape_of(first(node)) == (*shape[:1], *shape[2:]) else value


def _flat(tape: Tape, value: ir.Value) -> ir.Value:
    """[B, S, D/2] of a cosine or sine that may still have an axis for the heads."""
    shape = shape_of(value)
    return tape.add("Squeeze", value, [1], like=value, shape=(shape[0], *shape[2:])) if len(shape) == HEADS_RANK else value


def _per_sequence(tape: Tape, value: ir.Value, x: ir.Value) -> ir.Value:
    """[B, S, D/2] of what may be the same for all sequences, [1, S, D/2]; the batch is read from an input, so that all layers read it once."""
    batch = shape_of(x)[0]
    if shape_of(value)[0] == batch:
        return value
    fed = next((fed for fed in tape.graph.inputs if shape_of(fed)[:1] == (batch,)), x)
    shape = tape.add("Concat", tape.add("Shape", fed, end=1), [1, 1], axis=0)
    return tape.add("Expand", value, shape, like=value)
