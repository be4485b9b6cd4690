"""Tensors that every spelling of a layer has: what leaves a module, in the layout in which it leaves it.

Traced, fused and quantised graphs name and lay out what is inside a module as they please. What goes from module to module is the same in all:
the norm's output, each projection's, the context of the heads, both residual sums, and the caches. A packed projection gives its members' side by
side.
Letters: B batch, S new tokens, E hidden, K kv heads, T columns or slots of a cache, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.layout import MODULE_KEY, PACKED, layer_prefix
from graphs.partition import SKIP_NORM, SKIP_SUM

Array = NDArray[Any]
OUTPUT, RESIDUAL = "output", "residual"
"""The hidden state that leaves a cut; the sum in the middle of a layer."""
BLOCK = 1 << 20
"""Values that are compared at once, in float64: caches at the edge of a profile have hundreds of millions."""


def landmarks(cut: ir.Model, layer: int | None) -> dict[str, ir.Value]:
    """Role → the value that has it.

    Args:
        cut: of a layer, of what the layers share or of what follows them.
        layer: which; None outside the layers.

    Returns:
        Roles are module paths within the layer (`self_attn.o_proj`), whole outside; ``output``, ``residual``, `present.key`, `present.value`.
    """
    prefix = "" if layer is None else layer_prefix(layer)
    found: dict[str, ir.Value] = {}
    outputs = {value: _output_role(value, index, layer) for index, value in enumerate(cut.graph.outputs)}
    for node in cut.graph:
        module = node.metadata_props.get(MODULE_KEY, "")
        inner = module.removeprefix(prefix).removeprefix(".") if layer is not None else module
        for index, value in enumerate(node.outputs):
            if value in outputs:
                found[outputs[value]] = value
            elif node.op_type == SKIP_NORM and index == SKIP_SUM:
                found[RESIDUAL] = value
            elif any(user.metadata_props.get(MODULE_KEY, "") != module for user, _ in value.uses()):
                found[inner or RESIDUAL] = value
    return found


def _output_role(value: ir.Value, index: int, layer: int | None) -> str:
    name = str(value.name)
    if layer is not None:
        return OUTPUT if index == 0 else f"present.{name.rpartition('.')[2]}"
    return name


def expected_at(role: str, trusted: Mapping[str, Array]) -> Array | None:
    """What must be there: of a packed projection its members', one after the other on the last axis; None where there is no such role."""
    if role in trusted:
        return trusted[role]
    members = [trusted[member] for member in PACKED.get(role, ()) if member in trusted]
    return np.concatenate(members, axis=-1) if members and len(members) == len(PACKED[role]) else None


def position_error(ours: Array, theirs: Array) -> float:
    """Error of the worst vector along the last axis ÷ its size; inf where shapes differ or a value is not finite.

    Vector by vector, because the first token's is a thousand times larger than the others' and would be all that one sum sees. One that is almost
    zero is measured by a thousandth of the median.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    if not theirs.size:
        return 0.0
    if ours.dtype.kind not in "f":
        return 0.0 if np.array_equal(ours, theirs) else float("inf")
    width = ours.shape[-1] if ours.ndim else 1
    found, wanted = ours.reshape(-1, width), theirs.reshape(-1, width)
    size, error = np.empty(len(found)), np.empty(len(found))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for start in range(0, len(found), max(1, BLOCK // width)):
            rows = slice(start, start + max(1, BLOCK // width))
            exact = wanted[rows].astype(np.float64)
            size[rows] = np.linalg.norm(exact, axis=-1)
            error[rows] = np.linalg.norm(found[rows].astype(np.float64) - exact, axis=-1)
        worst = float(np.max(error / np.maximum(size, max(1e-3 * float(np.median(size)), 1e-30))))
    return worst if np.isfinite(worst) else float("inf")
