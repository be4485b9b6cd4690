"""Which numbers a value of a graph can hold, where they are few: a mask holds 0 and the smallest, however it was put together.

Exporters and model code build masks in many ways (a choice, a triangle times a comparison, sums of two, a scatter into a slice). What they have in
common is that all numbers come from a few constants; so those are followed, operator by operator, as numpy computes them in the value's own dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from graphs.fusions._reading import first
from graphs.fusions._values import numbers, producer

FEW = 8
Numbers = frozenset[float]


def possible(value: ir.Value) -> Numbers | None:
    """The numbers that elements of a value are among; None where they are many, or depend on what is fed."""
    found = _possible(value, {})
    return found if found is not None and len(found) <= FEW else None


def _possible(value: ir.Value, known: dict[ir.Value, Numbers | None]) -> Numbers | None:
    if value not in known:
        known[value] = _computed(value, known)
    return known[value]


def _computed(value: ir.Value, known: dict[ir.Value, Numbers | None]) -> Numbers | None:
    node = value.producer()
    if value.dtype == ir.DataType.BOOL:
        return frozenset((0.0, 1.0))
    if node is None:
        constants = numbers(value)
        return None if constants is None else _as(value, constants)
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get_tensor("value", None)
        return frozenset((0.0,)) if filled is None else _as(value, (float(filled.numpy().item()),))
    sources = [_possible(one, known) for one in _sources(node)]
    if node.op_type == "Where":
        sources[1] = _where_zero(node) or sources[1]
    if not sources or any(source is None for source in sources):
        return None
    sets = [source for source in sources if source is not None]
    if node.op_type in ARITHMETIC:
        return _as(value, _combined(ARITHMETIC[node.op_type], value, sets))
    return _as(value, itertools.chain(*sets, (0.0,) if node.op_type == "Trilu" else ()))


def _sources(node: ir.Node) -> list[ir.Value]:
    """Those inputs whose elements a node's output is made of; empty for an operator that is not followed."""
    of_input = [value for value in node.inputs if value is not None]
    return [of_input[index] for index in SOURCES.get(node.op_type, range(len(of_input))) if node.op_type in FOLLOWED]


def _where_zero(node: ir.Node) -> Numbers | None:
    """{0} for the second choice of Where(Cast(x, BOOL), ·, x): it is taken where x is 0."""
    cast = producer(node.inputs[0], "Cast")
    return frozenset((0.0,)) if cast is not None and first(cast) is node.inputs[2] else None


def _as(value: ir.Value, elements: Iterable[float]) -> Numbers:
    """Numbers as the value's dtype holds them."""
    with np.errstate(over="ignore"):
        return frozenset(map(float, np.array(list(elements)).astype(_dtype(value))))


def _combined(combine: Callable[..., object], value: ir.Value, sets: list[Numbers]) -> list[float]:
    dtype = _dtype(value)
    with np.errstate(all="ignore"):
        return [float(np.asarray(combine(*(np.array(one, dtype) for one in each)))) for each in itertools.product(*sets)]


def _dtype(value: ir.Value) -> np.dtype[np.generic]:
    return np.dtype(np.float64) if value.dtype is None else value.dtype.numpy()


ARITHMETIC: dict[str, Callable[..., object]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum}
MOVED = ("Cast", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Transpose", "Trilu")
SOURCES = {"Where": (1, 2), "ScatterND": (0, 2), **dict.fromkeys(MOVED, (0,))}
"""Of which inputs elements are taken; of all for the others. ConstantOfShape has a number of its own."""
FOLLOWED = {"Concat", *ARITHMETIC, *SOURCES}
