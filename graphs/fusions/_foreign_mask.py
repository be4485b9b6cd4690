"""What a mask of a foreign graph says: which key a query may attend to, as one boolean [B, 1, S, T] for all layers.

Numbers that are added to the scores are looked through to the condition that chose them. Every row may attend to itself, whatever the mask said: a
fully masked row (left padding) is NaN on some hardware, and would poison real rows. Which key is a row's own is known where the new keys are the
last ones, behind those of the past; in a cache of fixed capacity they lie anywhere, and such a graph is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from artifact.io_spec import TOTAL
from graphs.fusions._reading import Refused, Tape, operands, through
from graphs.fusions._values import producer, rank, scalar, sizes

HEADS_RANK = 4
BFLOAT16_MIN = -3.3895313892515355e38
NOTHING = {-np.inf, BFLOAT16_MIN, *(float(np.finfo(dtype).min) for dtype in (np.float16, np.float32))}
"""What masked scores are set to: a soft-max makes exact zeros of them."""

WRITES = ("TensorScatter", "ScatterND", "ScatterElements", "Scatter")
"""How new keys and values are written into a cache of fixed capacity."""
LINEAR = ("MatMul", "Gemm", "Attention")
"""Behind these a new key is no longer one, but what it is computed from."""


@dataclass(frozen=True)
class Condition:
    """A boolean of the graph; attended to where it is ``allows``."""

    value: ir.Value
    allows: bool


def condition_of_bias(bias: ir.Value) -> Condition:
    """The condition behind numbers that are added to scores: 0 where allowed, the smallest where not."""
    choice = operands(through(bias, "Expand", "Cast"), "Where")
    if choice is None:
        origin = bias.producer()
        raise Refused(
            f"the mask is added as numbers that come from {origin.op_type if origin else 'an input'}, not from a choice of 0 and the smallest"
        )
    condition, first, second = choice
    if scalar(first) == 0 and scalar(second) in NOTHING:
        return Condition(condition, allows=True)
    if scalar(second) == 0 and scalar(first) in NOTHING:
        return Condition(condition, allows=False)
    raise Refused("the mask is added as numbers other than 0 and the smallest")


def condition_of_choice(condition: ir.Value, first: ir.Value, second: ir.Value) -> tuple[Condition, ir.Value]:
    """The condition of Where(mask, scores, smallest), or of the other way round, and the scores."""
    if scalar(second) in NOTHING:
        return Condition(condition, allows=True), first
    if scalar(first) in NOTHING:
        return Condition(condition, allows=False), second
    raise Refused("masked scores are not set to the smallest number")


def check_conditions(conditions: Sequence[Condition], new: object, total: object) -> None:
    """Raise Refused unless the conditions are shared by all heads, and the first has a row for each query and a column for each key."""
    if not conditions:
        raise Refused("there is no mask")
    for condition in conditions:
        shape = sizes(condition.value)
        if condition.value.dtype != ir.DataType.BOOL or shape is None or rank(condition.value) != HEADS_RANK or shape[1] != 1:
            raise Refused(f"the mask is {condition.value.dtype} {shape}, not bool [B, 1, S, T]")
    if not any((sizes(condition.value) or ())[2:] == (new, total) for condition in conditions):
        raise Refused(f"no mask has a row for each query and a column for each key: {[sizes(condition.value) for condition in conditions]}")


def check_new_are_last(name: str, cached: ir.Value, new: object) -> None:
    """Raise Refused unless the rows of a key or value [B, K, T, D] are those of the past, and the new ones behind them."""
    if writer := _writer(cached):
        raise Refused(f"{name} come from {writer.op_type}: a cache of fixed capacity, in which the new ones are not the last")
    rows, joined = (sizes(cached) or ())[2], producer(cached, "Concat")
    if joined is not None and joined.attributes.get_int("axis", 0) in (2, 2 - HEADS_RANK):
        last = (sizes(joined.inputs[-1]) or (None,) * HEADS_RANK)[2]
        if last != new:
            raise Refused(f"{name} end with {last} rows; expected the {new} new ones, behind those of the past")
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
    values = [condition.value if condition.allows else tape.add("Not", condition.value) for condition in conditions]
    allowed = values[0]
    for value in values[1:]:
        allowed = tape.add("And", allowed, value)
    new = tape.add("Squeeze", tape.add("Shape", allowed, start=2, end=3), [0])
    total = tape.add("Squeeze", tape.add("Shape", allowed, start=3, end=4), [0])
    keys = tape.add("Range", tape.constant(0), total, tape.constant(1))  # [T]
    queries = tape.add("Range", tape.add("Sub", total, new), total, tape.constant(1))  # [S]
    itself = tape.add("Equal", keys, tape.add("Unsqueeze", queries, [1]))  # [S, T]
    return tape.add("Or", allowed, itself)
