"""What the files here share: why an operator is not lowered, attributes that must be as they are, and nodes that all layers share."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from artifact.errors import FusionError
from graphs.fusions._values import Shape, Size, in_module, sizes
from graphs.tensorrt_releases import first_release


def refuse(node: ir.Node, reason: str) -> FusionError:
    """An operator in a form that no rule of ours makes."""
    hint = f"--min-tensorrt {first_release(node.op_type)}, the first release that takes the operator itself"
    return FusionError(f"{node.name} ({node.op_type}) can't be written in older operators: {reason}", hint=hint)


def check_plain(node: ir.Node, **allowed: float) -> None:
    """Refuse attributes that change what is computed.

    Args:
        node: the operator.
        allowed: attribute → the one value that it may have; all others of the operator must be absent.

    Raises:
        FusionError: names the attribute.
    """
    for name, attribute in node.attributes.items():
        if name not in allowed or attribute.value != allowed[name]:
            raise refuse(node, f"{name}={attribute.value}")


def axis_size(value: ir.Value | None, axis: int) -> Size:
    """Size of an axis of [B, heads, S, D]; None where it is not known."""
    shape = sizes(value)
    return shape[axis] if shape is not None and len(shape) == 4 else None


def made_of(value: ir.Value, op_type: str, same: Callable[[ir.Node], bool]) -> ir.Value | None:
    """What a node of this operator makes of a value already, in the same way."""
    found = (use.node for use in value.uses() if use.node.op_type == op_type and use.idx == 0)
    return next((node.outputs[0] for node in found if same(node)), None)


def put_before(graph: ir.Graph, node: ir.Node, made: ir.Node, shape: Shape | None, module: str) -> ir.Value:
    """Put a node that all layers share in front of the first that reads it; what it makes has the dtype of its first input."""
    source, output = made.inputs[0], made.outputs[0]
    assert source is not None
    made.name = output.name = f"{source.name}.{made.op_type}"
    output.type = source.type
    in_module(output, module, shape=shape)
    graph.insert_before(node, made)
    return output
