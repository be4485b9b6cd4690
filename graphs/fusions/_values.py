"""What rules read from a graph's values, and how they describe the values they make. Weights are never read."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from artifact.layout import MODULE_KEY

SMALL_CONSTANT = 64
"""Elements up to which a constant may be a number or a shape; whatever is larger is data, and is not read."""

UNCHANGED = (0, 0, 0, 0)
"""Shape of a Reshape that leaves four axes as they are."""

Size = int | str | None
Shape = tuple[Size, ...]


def numbers(value: ir.Value | None) -> tuple[float | int, ...] | None:
    """Elements of a small constant, flattened; None for what is computed, fed, large or stored outside the graph."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > SMALL_CONSTANT:
        return None
    return tuple(tensor.numpy().ravel().tolist())


def scalar(value: ir.Value | None) -> float | int | None:
    """The number that a one-element constant holds; None for everything else."""
    found = numbers(value)
    return found[0] if found is not None and len(found) == 1 else None


def sizes(value: ir.Value | None) -> Shape | None:
    """Shape of a value: a number, or the name of a dynamic axis, or None for an axis that nothing is known of; None without a rank."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes, None where it isn't known."""
    shape = sizes(value)
    return None if shape is None else len(shape)


def last_size(value: ir.Value | None) -> Size:
    """Size of the last axis, None where it isn't known."""
    shape = sizes(value)
    return shape[-1] if shape else None


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes a value, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def unreshaped(value: ir.Value | None) -> ir.Value | None:
    """What a value [·, ·, ·, ·] is before a Reshape that changes nothing (graphs/fusions/attention.py writes one), if there is one."""
    reshape = producer(value, "Reshape")
    return reshape.inputs[0] if reshape is not None and numbers(reshape.inputs[1]) == UNCHANGED else value


def axis_read(size: ir.Value | None) -> Size:
    """The axis whose size Shape reads, if it is a single one."""
    shape = producer(size, "Shape")
    source = sizes(shape.inputs[0]) if shape is not None else None
    if source is None:
        return None
    assert shape is not None
    axes = source[shape.attributes.get_int("start", 0) : shape.attributes.get_int("end", len(source))]
    return axes[0] if len(axes) == 1 else None


def node_of(value: ir.Value) -> ir.Node:
    """The node that computes a value of which that is known: a pattern has matched it."""
    node = value.producer()
    assert node is not None
    return node


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if there is just one and it is of this operator."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def cast_to(value: ir.Value | None) -> ir.DataType | None:
    """The dtype that the Cast node behind a value makes; None where there is none."""
    cast = producer(value, "Cast")
    return None if cast is None else ir.DataType(cast.attributes.get_int("to"))


def is_last_axis(axis: float | int | None, value: ir.Value | None) -> bool:
    """Whether an axis number means the last axis of a value."""
    n_axes = rank(value)
    return axis == -1 or (n_axes is not None and axis == n_axes - 1)


def module_of(value: ir.Value) -> str:
    """Module path of the node that computes a value; empty where it has none."""
    node = value.producer()
    return node.metadata_props.get(MODULE_KEY, "") if node is not None else ""


def in_module(value: ir.Value, module: str, dtype: ir.DataType | None = None, shape: Shape | None = None) -> ir.Value:
    """Record where a new value belongs and, for values within a replacement, its dtype and shape; returns the value."""
    node = node_of(value)
    if module:
        node.metadata_props[MODULE_KEY] = module
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    if shape is not None:
        value.shape = ir.Shape(shape)
    return value


def shape_constant(op: Any, name: str, values: list[int]) -> ir.Value:
    """A new int64 initializer; equal ones become one in the end (graphs/cleanup.py)."""
    made: ir.Value = op.initializer(ir.tensor(values, dtype=ir.DataType.INT64, name=name))
    return made
