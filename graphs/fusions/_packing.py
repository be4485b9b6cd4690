"""Linears that read one input, and the proof that their weights are one: rows that lie next to each other in one file.

A packed weight is a wider view of the same bytes. It is split on a new axis, never by slicing the last one: a two-profile plan would store a sliced
GEMM's weight twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from artifact.layout import PACKED
from graphs.fusions._rule import Objection
from graphs.fusions._values import in_module, last_size, rank, sizes

TURNED = (1, 0)
WEIGHT = ".weight"


def packing_objections(x: ir.Value, weights: Sequence[ir.Value], packed: str) -> Iterator[Objection]:
    """Why weights [out, in] of linears that read ``x`` are not one packed weight; the first objection is the reason."""
    if rank(x) != 3:
        yield "the input is not [B, S, E]", x
    for weight in weights:
        if not isinstance(weight.const_value, ir.ExternalTensor) or rank(weight) != 2 or last_size(weight) != last_size(x):
            yield f"{weight.name} is not a weight [out, in] stored outside the graph", weight
    if len({weight.dtype for weight in weights}) != 1:
        yield f"{_names(weights)} are not of one dtype", weights[0]
    for first, second in pairwise(weights):
        if _end(first) != _start(second):
            yield f"{second.name} does not lie behind {first.name}: {_place(first)}, {_place(second)}; a packed weight would be a copy", second
    if packed_module(weights, packed) is None:
        yield f"{_names(weights)} are not named {', '.join(PACKED[packed])} of one layer", weights[0]


def packed_module(weights: Sequence[ir.Value], packed: str) -> str | None:
    """Module path of the packed projection (`model.layers.3.self_attn.qkv_proj`), None where the weights have other names or another order."""
    prefixes: set[str | None] = set()
    for weight, member in zip(weights, PACKED[packed], strict=True):
        prefix, found, rest = (weight.name or "").rpartition(f"{member}{WEIGHT}")
        prefixes.add(prefix if found and not rest else None)
    layer = prefixes.pop()
    return None if layer is None or prefixes else layer + packed


def packed_linear(op: Any, x: ir.Value, weights: Sequence[ir.Value], packed: str) -> ir.Value:
    """One linear for several: MatMul(x, Transpose(weight [sum of outs, in])) [B, S, sum of outs]."""
    module, rows = packed_module(weights, packed), sum(int((sizes(weight) or (0,))[0] or 0) for weight in weights)
    columns, dtype = last_size(weights[0]), weights[0].dtype
    assert module is not None
    assert dtype is not None
    weight = op.initializer(_joined(weights, f"{module}{WEIGHT}", (rows, columns)))
    turned = in_module(op.Transpose(weight, perm=TURNED), module, dtype, (columns, rows))
    return in_module(op.MatMul(x, turned), module, dtype, (*(sizes(x) or ())[:2], rows))


def _joined(weights: Sequence[ir.Value], name: str, shape: tuple[Any, ...]) -> ir.ExternalTensor:
    """The bytes of all weights as one tensor; nothing is read."""
    first = _stored(weights[0])
    length = sum(_stored(weight).nbytes for weight in weights)
    return ir.ExternalTensor(first.location, first.offset or 0, length, first.dtype, shape=ir.Shape(shape), name=name, base_dir=first.base_dir)


def _stored(weight: ir.Value) -> ir.ExternalTensor:
    assert isinstance(weight.const_value, ir.ExternalTensor)
    return weight.const_value


def _start(weight: ir.Value) -> tuple[str, int]:
    return str(_stored(weight).location), _stored(weight).offset or 0


def _end(weight: ir.Value) -> tuple[str, int]:
    location, offset = _start(weight)
    return location, offset + _stored(weight).nbytes


def _place(weight: ir.Value) -> str:
    return f"{_start(weight)[0]} bytes {_start(weight)[1]} to {_end(weight)[1]}"


def _names(weights: Sequence[ir.Value]) -> str:
    return ", ".join(str(weight.name) for weight in weights)
