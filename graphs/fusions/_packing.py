"""Linears that read one input, and the proof that their weights (and biases) are one: rows that lie next to each other in one file.

A packed weight is a wider view of the same bytes. It is split on a new axis, never by slicing the last one: a two-profile plan would store a sliced
GEMM's weight twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from artifact.layout import PACKED
from graphs.fusions._reading import Refused, first, need
from graphs.fusions._rule import Objection
from graphs.fusions._values import in_module, last_size, producer, rank, sizes

TURNED = (1, 0)
WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Projections:
    """Linears that read ``x`` [B, S, E]: their weights [out, in], which lie next to each other, and their biases [out], or none."""

    x: ir.Value
    weights: tuple[ir.Value, ...]
    biases: tuple[ir.Value, ...]

    def packed(self, op: Any, name: str) -> ir.Value:
        """All of them as one (``packed_linear``)."""
        return packed_linear(op, self.x, self.weights, name, self.biases)


def read_projections(sources: Mapping[str, ir.Value | None], packed: str) -> Projections:
    """The linears x ─ MatMul(Transpose(weight)) ─ Add(bias)? that some values are the outputs of.

    Args:
        sources: the values, by what they are called in a refusal.
        packed: name of the packed projection.

    Raises:
        Refused: one of them is something else, or they are not one packed linear.
    """
    parts = [_projection(name, value) for name, value in sources.items()]
    inputs, biases = {x for x, _, _ in parts}, tuple(bias for _, _, bias in parts if bias is not None)
    if len(inputs) != 1:
        raise Refused(f"{_listed(sources)} are projected from different inputs")
    if biases and len(biases) != len(parts):
        raise Refused(f"some of {_listed(sources)} have a bias and some have none")
    found = Projections(inputs.pop(), tuple(weight for _, weight, _ in parts), biases)
    for reason, _ in packing_objections(found.x, found.weights, packed, biases):
        raise Refused(reason)
    return found


def _listed(names: Mapping[str, Any]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}"


def _projection(name: str, value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Input, weight and bias of one."""
    otherwise = f"the {name} is not projected by a transposed weight [out, in]"
    biased = producer(value, "Add")
    linear = need(value if biased is None else biased.inputs[0], "MatMul", otherwise=otherwise)
    turned = need(linear.inputs[1], "Transpose", otherwise=otherwise)
    if turned.attributes.get_ints("perm") != TURNED:
        raise Refused(otherwise)
    return first(linear), first(turned), None if biased is None else biased.inputs[1]


def packing_objections(x: ir.Value, weights: Sequence[ir.Value], packed: str, biases: Sequence[ir.Value] = ()) -> Iterator[Objection]:
    """Why weights [out, in] of linears that read ``x``, and biases [out], are not one packed weight and bias; the first objection is the reason."""
    if rank(x) != 3:
        yield "the input is not [B, S, E]", x
    for weight in weights:
        if not isinstance(weight.const_value, ir.ExternalTensor) or rank(weight) != 2 or last_size(weight) != last_size(x):
            yield f"{weight.name} is not a weight [out, in] stored outside the graph", weight
    for bias, weight in zip(biases, weights, strict=False):
        if not isinstance(bias.const_value, ir.ExternalTensor) or sizes(bias) != (rows(weight),):
            yield f"{bias.name} is not a bias [out] stored outside the graph", bias
    yield from _one_tensor_objections(weights, packed, WEIGHT)
    if biases:
        yield from _one_tensor_objections(biases, packed, BIAS)
        if packed_module(weights, packed) != packed_module(biases, packed, BIAS):
            yield f"{_names(biases)} are not the biases of {_names(weights)}", biases[0]


def _one_tensor_objections(parts: Sequence[ir.Value], packed: str, suffix: str) -> Iterator[Objection]:
    if len({part.dtype for part in parts}) != 1:
        yield f"{_names(parts)} are not of one dtype", parts[0]
    for before, after in pairwise(parts):
        if _end(before) != _start(after):
            kind = suffix.removeprefix(".")
            yield f"{after.name} does not lie behind {before.name}: {_place(before)}, {_place(after)}; a packed {kind} would be a copy", after
    if packed_module(parts, packed, suffix) is None:
        yield f"{_names(parts)} are not named {', '.join(PACKED[packed])} of one layer", parts[0]


def packed_module(parts: Sequence[ir.Value], packed: str, suffix: str = WEIGHT) -> str | None:
    """Module path of the packed projection (`model.layers.3.self_attn.qkv_proj`), None where its parts have other names or another order."""
    prefixes: set[str | None] = set()
    for part, member in zip(parts, PACKED[packed], strict=True):
        assert part.name is not None
        prefix, _, rest = part.name.rpartition(f"{member}{suffix}")  # of another name all is rest
        prefixes.add(None if rest else prefix)
    layer = prefixes.pop()
    return None if layer is None or prefixes else layer + packed


def packed_linear(op: Any, x: ir.Value, weights: Sequence[ir.Value], packed: str, biases: Sequence[ir.Value] = ()) -> ir.Value:
    """One linear for several: MatMul(x, Transpose(weight [sum of outs, in])) [B, S, sum of outs], and Add(bias) where they have biases."""
    module, out = packed_module(weights, packed), sum(map(rows, weights))
    columns, dtype, shape = last_size(x), x.dtype, sizes(x)
    assert module is not None
    assert dtype is not None
    assert shape is not None
    shape = (*shape[:2], out)
    weight = op.initializer(_joined(weights, f"{module}{WEIGHT}", (out, columns)))
    turned = in_module(op.Transpose(weight, perm=TURNED), module, dtype, (columns, out))
    product = in_module(op.MatMul(x, turned), module, dtype, shape)
    if not biases:
        return product
    bias = op.initializer(_joined(biases, f"{module}{BIAS}", (out,)))
    return in_module(op.Add(product, bias), module, dtype, shape)


def _joined(weights: Sequence[ir.Value], name: str, shape: tuple[Any, ...]) -> ir.ExternalTensor:
    """The bytes of all weights as one tensor; nothing is read."""
    first = _stored(weights[0])
    length = sum(_stored(weight).nbytes for weight in weights)
    return ir.ExternalTensor(first.location, first.offset or 0, length, first.dtype, shape=ir.Shape(shape), name=name, base_dir=first.base_dir)


def rows(weight: ir.Value) -> int:
    """Rows of a weight [out, in], or elements of a bias [out], that is stored outside the graph."""
    return int(_stored(weight).shape.numpy()[0])


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
