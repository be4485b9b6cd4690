"""What the files here share: why an operator is not lowered, and attributes that must be as they are without being said."""

from __future__ import annotations

import onnx_ir as ir

from artifact.errors import FusionError
from graphs.fusions._values import Size, sizes
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
