"""How the rules for foreign graphs read: from one node outwards, in words where it goes no further.

A fusion of our own trace is one pattern. Other exporters spell it in many ways, so their rules are readers: ``is_candidate`` finds the one node that
every spelling has (a mean, a soft-max), ``read`` walks from it over whatever was written, and returns what it means or raises ``Refused``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.layout import MODULE_KEY
from graphs.fusions._values import Shape, node_of, numbers, producer, scalar, sizes
from graphs.rewriting import FusionResult, Refusal


class Refused(Exception):
    """Why a candidate is not fused, in words."""


class Reader(Protocol):
    """A fusion file for foreign graphs."""

    def is_candidate(self, node: ir.Node) -> bool:
        """Whether a node could belong to what is fused."""
        ...

    def read(self, node: ir.Node) -> Any:
        """What the nodes around a candidate compute; raises Refused."""
        ...

    def rewrite(self, graph: ir.Graph, found: Any) -> None:
        """Replace them."""
        ...


def apply_reader(model: ir.Model, reader: Reader) -> FusionResult:
    """Rewrite every candidate that can be read, drop what is dead then, and say why the others were refused."""
    fired, refused = 0, []
    for node in [node for node in model.graph if reader.is_candidate(node)]:
        try:
            found = reader.read(node)
        except Refused as reason:
            refused.append(Refusal(node.name or node.op_type, str(reason)))
            continue
        reader.rewrite(model.graph, found)
        fired += 1
    model.graph.sort()
    common_passes.RemoveUnusedNodesPass()(model)
    return FusionResult(fired, refused)


class Tape:
    """New nodes in order, named after the value that the last one replaces.

    Nothing is shared here: what each layer makes again becomes one when equal computations are merged.
    """

    def __init__(self, graph: ir.Graph, replaced: ir.Value) -> None:
        self.graph, self.replaced = graph, replaced
        self.nodes: list[ir.Node] = []

    def add(
        self,
        op_type: str,
        *inputs: ir.Value | Sequence[int] | None,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node; numbers among its inputs become int64 constants; it is typed by ``dtype``, or like another value."""
        return self.add_all(op_type, *inputs, outputs=1, like=like, dtype=dtype, shape=shape, **attributes)[0]

    def add_all(
        self,
        op_type: str,
        *inputs: ir.Value | Sequence[int] | None,
        outputs: int,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: Shape | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """As ``add``, all outputs of a node; they are of one dtype and shape."""
        name = f"{self.replaced.name}.{op_type}_{len(self.nodes)}"
        values = [one if one is None or isinstance(one, ir.Value) else self.constant(one) for one in inputs]
        type_ = ir.TensorType(dtype) if dtype is not None else None if like is None else like.type
        names = [name if outputs == 1 else f"{name}.{index}" for index in range(outputs)]
        made = [ir.Value(name=one, type=type_, shape=None if shape is None else ir.Shape(shape)) for one in names]
        self.nodes.append(ir.node(op_type, values, attributes, outputs=made, name=name))
        return made

    def constant(self, values: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer of few elements; of integers in int64, unless said otherwise."""
        name = next(name for index in count(1) if (name := f"{self.replaced.name}.constant_{index}") not in self.graph.initializers)
        tensor = ir.tensor(values, dtype=dtype, name=name)
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def finish(self) -> None:
        """Put the nodes in the place of the one behind the replaced value, in its module; the last one's output takes its uses and its name."""
        old = self.replaced.producer()
        assert old is not None
        last = self.nodes[-1]
        last.name = old.name
        if MODULE_KEY in old.metadata_props:
            for node in self.nodes:
                node.metadata_props[MODULE_KEY] = old.metadata_props[MODULE_KEY]
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], self.nodes, [self.replaced], [last.outputs[0]])


def user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node of these operators that reads a value; None if there is none, or more."""
    found = {use.node: None for use in value.uses() if use.node.op_type in op_types}
    return next(iter(found)) if len(found) == 1 else None


def need_user(value: ir.Value, *op_types: str, otherwise: str) -> ir.Node:
    """The one node of these operators that reads a value; raises Refused with these words if there is none, or more."""
    node = user(value, *op_types)
    if node is None:
        raise Refused(otherwise)
    return node


def need(value: ir.Value | None, *op_types: str, otherwise: str) -> ir.Node:
    """The node behind a value, of one of these operators; raises Refused with these words if it is none."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        raise Refused(otherwise)
    return node


def op_of(value: ir.Value | None) -> str:
    """The operator behind a value; empty for what is fed or stored."""
    node = value.producer() if value is not None else None
    return "" if node is None else node.op_type


def first(node: ir.Node) -> ir.Value:
    """The first input of a node that can't do without one."""
    value = node.inputs[0]
    assert value is not None
    return value


def constants(node: ir.Node, index: int, default: tuple[int, ...] | None = None) -> tuple[float | int, ...] | None:
    """Elements of an input that is a small constant; ``default`` if the node has fewer inputs, None for what is computed or fed."""
    return numbers(node.inputs[index]) if len(node.inputs) > index else default


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand beside ``value``; the value itself if it is both, None if it is neither."""
    left, right = node.inputs
    if left is value:
        return right
    return left if right is value else None


def shape_of(value: ir.Value | None) -> Shape:
    """Shape of a value; () where it is not known, which no tensor of a decoder has."""
    return sizes(value) or ()


def scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """What a value is before it is multiplied or divided by constant numbers, and their product."""
    factor = 1.0
    while True:
        node = value.producer()
        if node is None or node.op_type not in ("Mul", "Div"):
            return value, factor
        left, right = node.inputs
        assert left is not None
        assert right is not None
        by_right, by_left = scalar(right), scalar(left) if node.op_type == "Mul" else None
        if by_right is not None:
            value, factor = left, factor * (by_right if node.op_type == "Mul" else 1 / by_right)
        elif by_left is not None:
            value, factor = right, factor * by_left
        else:
            return value, factor


def through(value: ir.Value, *op_types: str) -> ir.Value:
    """What a value is before nodes of one input that are of these operators."""
    while op_of(value) in op_types:
        value = first(node_of(value))
    return value


def operands(value: ir.Value | None, op_type: str) -> tuple[ir.Value, ...] | None:
    """Inputs of the node behind a value if it is of this operator."""
    node = producer(value, op_type)
    return None if node is None else tuple(one for one in node.inputs if one is not None)
