"""What a mask of a foreign graph says: which key a query may attend to, as one boolean [B, 1, S, T] for all layers.

Numbers that are added to the scores are looked through to the condition that chose them; where a mask was put together of several, it allows
what it holds 0 for (graphs/fusions/_possible.py knows that it holds nothing but 0 and the smallest). Every row may attend to itself, whatever
the mask said: a fully masked row (left padding) is NaN on some hardware, and would poison real rows. Which key is a row's own is known where the
new keys are the last ones, behind those of the past; in a cache of fixed capacity they lie anywhere, and such a graph is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from artifact.io_spec import TOTAL
from graphs.fusions._possible import possible
from graphs.fusions._reading import Refused, Tape, operands, shape_of, through
from graphs.fusions._values import producer, scalar

HEADS_RANK = 4
LARGEST_NOTHING = float(np.finfo(np.float16).min)
"""From here on down a masked score is nothing: a soft-max makes an exact zero of it, beside any score that float16 can hold."""

WRITES = ("TensorScatter", "ScatterND", "ScatterElements", "Scatter")
"""How new keys and values are written into a cache of fixed capacity."""
LINEAR = ("MatMul", "Gemm", "Attention")
"""Behind these a new key is no longer one, but what it is computed from."""


@dataclass(frozen=True)
class Condition:
    """A boolean of the graph, attended to where it is ``allows``; or the numbers of a mask, attended to where they are 0."""

    value: ir.Value
    allows: bool = True


def condition_of_bias(bias: ir.Value) -> Condition:
    """The condition behind numbers that are added to scores: 0 where allowed, the smallest where not."""
    choice = operands(through(bias, "Expand", "Cast"), "Where")
    if choice is not None and scalar(choice[1]) == 0 and is_nothing(scalar(choice[2])):
        return Condition(choice[0])
    if choice is not None and scalar(choice[2]) == 0 and is_nothing(scalar(choice[1])):
        return Condition(choice[0], allows=False)
    found = possible(bias)
    if found is None:
        node = bias.producer()
        raise Refused(f"the mask is added as numbers that come from {node.op_type if node else 'an input'}, maybe others than 0 and the smallest")
    if not all(number == 0 or is_nothing(number) for number in found):
        raise Refused(f"the mask is added as numbers other than 0 and the smallest: {sorted(found)}")
    return Condition(bias)


def is_nothing(number: float | None) -> bool:
    """Whether a masked score is set to what a soft-max makes exactly zero of."""
    return number is not None and number <= LARGEST_NOTHING


def condition_of_choice(condition: ir.Value, one: ir.Value, two: ir.Value) -> tuple[Condition, ir.Value]:
    """The condition of Where(mask, scores, smallest), or of the other way round, and the scores."""
    if is_nothing(scalar(two)):
        return Condition(condition), one
    if is_nothing(scalar(one)):
        return Condition(condition, allows=False), two
    raise Refused("masked scores are not set to the smallest number")


def check_conditions(conditions: Sequence[Condition], new: object, total: object) -> None:
    """Raise Refused unless the conditions are shared by all heads, and one has a row for each query and a column for each key."""
    if not conditions:
        raise Refused("there is no mask")
    shapes = [shape_of(condition.value) for condition in conditions]
    for shape in shapes:
        if len(shape) != HEADS_RANK or shape[1] != 1:
            raise Refused(f"the mask is {list(shape)}, not [B, 1, S, T]")
    if not any(shape[2:] == (new, total) for shape in shapes):
        raise Refused(f"no mask has a row for each query and a column for each key: {shapes}")


def check_new_are_last(name: str, cached: ir.Value, new: object) -> None:
    """Raise Refused unless the rows of a key or value [B, K, T, D] are those of the past, and the new ones behind them."""
    if writer := _writer(cached):
        raise Refused(f"{name} come from {writer.op_type}: a cache of fixed capacity, in which the new ones are not the last")
    rows, joined = shape_of(cached)[2], producer(cached, "Concat")
    if joined is not None and joined.attributes.get_int("axis") in (2, 2 - HEADS_RANK):
        last = shape_of(joined.inputs[-1])
        if last[2:3] != (new,):
            raise Refused(f"{name} end with {list(last)}; expected the {new} new rows, behind those of the past")
    elif rows not in (TOTAL, new):
        raise Refused(f"there are {rows} {name}; expected as many as past and new tokens: a cache of fixed capacity is not fused")


def _writer(cached: ir.Value) -> ir.Node | None:
    """The node that writes into a cache, if there is one on the way from the new keys or values to where they are read."""
    seen: set[ir.Node] = set()
    waiting = [cached.producer()]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node.op_type in LINEAR:
            continue
        if node.op_type in WRITES:
            return node
        seen.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return None


def joined_mask(tape: Tape, conditions: Sequence[Condition]) -> ir.Value:
    """One mask [B, 1, S, T] that allows what all conditions allow, and every row itself: key T − S + i for query i."""
    values = [_allowed(tape, condition) for condition in conditions]
    allowed = values[0]
    for value in values[1:]:
        allowed = tape.add("And", allowed, value)
    new = tape.add("Squeeze", tape.add("Shape", allowed, start=2, end=3), [0])
    total = tape.add("Squeeze", tape.add("Shape", allowed, start=3), [0])
    keys = tape.add("Range", tape.constant(0), total, tape.constant(1))  # [T]
    queries = tape.add("Range", tape.add("Sub", total, new), total, tape.constant(1))  # [S]
    itself = tape.add("Equal", keys, tape.add("Unsqueeze", queries, [1]))  # [S, T]
    return tape.add("Or", allowed, itself)


def _allowed(tape: Tape, condition: Condition) -> ir.Value:
    value = condition.value
    if value.dtype != ir.DataType.BOOL:
        return tape.add("Equal", value, tape.constant(0, value.dtype))
    return value if condition.allows else tape.add("Not", value)
