"""Fuse RMSNorm as other exporters write it into one ``RMSNormalization`` node (ONNX opset 23).

Before:  x ─ Cast(float32)? ─ Pow(2) | Mul(x, x) ─ ReduceMean(-1) ─ Add(eps) ─ Sqrt ─┬ Reciprocal ─ Mul(x)
                                                                                     ├ Div(1, ·) ─ Mul(x)        ─ Cast(back)? ─ Mul(weight)
                                                                                     └ Div(x, ·)
         or Pow(-0.5) in the place of Sqrt and Reciprocal; every product in either order
After:   x ─ RMSNormalization(weight, axis=-1, epsilon=eps, stash_type=FLOAT)
         of a float32 x that is cast to float16 before a float16 weight (optimum's float16): x ─ RMSNormalization(Cast(weight)) ─ Cast(float16),
         which rounds once where two roundings were
Source:  https://onnx.ai/onnx/operators/onnx__RMSNormalization.html
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._reading import Refused, Tape, constants, first, need_user, operands, other, shape_of, through, user
from graphs.fusions._values import Size, is_last_axis, last_size, producer, scalar, sizes

NO_EPSILON = "no constant epsilon is added to the mean of squares"
NOT_DIVIDED = "the values are not divided by the root of their variance"
NO_WEIGHT = "the result is not multiplied by a weight, a vector over the last axis"


@dataclass(frozen=True)
class Norm:
    """One norm: ``weight`` · x / root mean square of x, ``scaled`` its output."""

    x: ir.Value
    weight: ir.Value
    epsilon: float
    scaled: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every mean could be a norm's."""
    return node.op_type == "ReduceMean"


def read(mean: ir.Node) -> Norm:
    """The norm around a mean; raises Refused."""
    squared = _squared(mean)
    _check_axis(mean, squared)
    epsilon, variance = _epsilon(mean.outputs[0])
    normed = _normed(variance, squared)
    if squared.dtype != ir.DataType.FLOAT:
        raise Refused(f"it computes in {squared.dtype} without a cast to FLOAT; RMSNormalization computes in FLOAT and would change the numbers")
    cast, rounded = producer(squared, "Cast"), user(normed, "Cast")
    x = squared
    if rounded is not None:
        x, normed = first(cast) if cast is not None else squared, rounded.outputs[0]
    if normed.dtype != x.dtype and (x.dtype, normed.dtype) != (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Refused(f"the result is {normed.dtype} when the weight is applied, the input is {x.dtype}")
    weight, scaled = _weight(normed, last_size(x))
    return Norm(x, weight, epsilon, scaled)


def rewrite(graph: ir.Graph, found: Norm) -> None:
    """One node in the place of the last multiplication; of a float32 input the result is rounded as it was, after the weight and not before it."""
    tape, weight, narrowed = Tape(graph, found.scaled), found.weight, found.x.dtype != found.weight.dtype
    if narrowed:
        weight = tape.add("Cast", weight, to=int(ir.DataType.FLOAT), like=found.x, shape=sizes(weight))
    stash = int(ir.DataType.FLOAT)
    scaled = tape.add("RMSNormalization", found.x, weight, axis=-1, epsilon=found.epsilon, stash_type=stash, like=found.x, shape=sizes(found.x))
    if narrowed:
        tape.add("Cast", scaled, to=int(ir.DataType.FLOAT16))
    tape.finish()


def _squared(mean: ir.Node) -> ir.Value:
    """What is squared before the mean."""
    power, product = operands(mean.inputs[0], "Pow"), operands(mean.inputs[0], "Mul")
    if power is not None and scalar(power[1]) == 2:
        return power[0]
    if product is not None and product[0] is product[1]:
        return product[0]
    raise Refused("the mean is not one of squares")


def _check_axis(mean: ir.Node, x: ir.Value) -> None:
    axes = constants(mean, 1)
    if axes is None or len(axes) != 1 or not is_last_axis(axes[0], x):
        raise Refused("the mean is not taken over the last axis")
    if mean.attributes.get_int("keepdims", 1) != 1:
        raise Refused("the mean drops its axis (keepdims=0)")


def _epsilon(mean: ir.Value) -> tuple[float, ir.Value]:
    added = need_user(mean, "Add", otherwise=NO_EPSILON)
    epsilon = scalar(other(added, mean))
    if epsilon is None:
        raise Refused(NO_EPSILON)
    return float(epsilon), added.outputs[0]


def _normed(variance: ir.Value, x: ir.Value) -> ir.Value:
    """``x`` divided by the root of its variance, in any spelling."""
    power = user(variance, "Pow")
    if power is not None and scalar(power.inputs[1]) == -0.5:
        return _times(power.outputs[0], x)
    root = need_user(variance, "Sqrt", otherwise="no root of the variance is taken").outputs[0]
    divided = need_user(root, "Reciprocal", "Div", otherwise=NOT_DIVIDED)
    if divided.inputs[0] is x:
        return divided.outputs[0]
    if divided.op_type == "Div" and scalar(divided.inputs[0]) != 1:
        raise Refused(NOT_DIVIDED)
    return _times(divided.outputs[0], x)


def _times(inverse: ir.Value, x: ir.Value) -> ir.Value:
    product = need_user(inverse, "Mul", otherwise=NOT_DIVIDED)
    if other(product, inverse) is not x:
        raise Refused("what is divided by the root is not what was squared")
    return product.outputs[0]


def _weight(normed: ir.Value, size: Size) -> tuple[ir.Value, ir.Value]:
    """The weight, of the dtype that the values have now, and the product with it."""
    product = need_user(normed, "Mul", otherwise=NO_WEIGHT)
    weight = other(product, normed)
    assert weight is not None
    if shape_of(weight) != (size,) or not through(weight, "Cast").is_initializer():
        raise Refused(NO_WEIGHT)
    if weight.dtype != normed.dtype:
        raise Refused(f"the weight is {weight.dtype}, what it is applied to is {normed.dtype}")
    return weight, product.outputs[0]
