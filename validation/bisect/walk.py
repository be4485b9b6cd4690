"""Walk through a cut node by node, each landmark compared with the trusted one and replaced by it: an error shows where it is made alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact import io_spec
from artifact.errors import ValidationError
from artifact.layout import PACKED
from graphs.fusions._contrib import GROUPED
from validation.bisect.landmarks import expected_at, landmarks, position_error
from validation.node_runner import run_nodes

Array = NDArray[Any]


@dataclass(frozen=True)
class Tensor:
    """A landmark of a cut, as it was computed from exact inputs.

    Attributes:
        role: in the layer (landmarks.py).
        value: the graph's.
        error: of its worst vector, relative (``position_error``).
        allowed: what the dtype explains.
    """

    role: str
    value: ir.Value
    error: float
    allowed: float

    @property
    def share(self) -> float:
        """Of what is allowed; above 1 is a fault. What is not finite is one whatever the limit; a limit that is not finite is none."""
        if not np.isfinite(self.error):
            return float("inf")
        if not np.isfinite(self.allowed):
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf" if self.error else 0.0)


def run_trusted(
    cut: ir.Model, layer: int | None, feeds: Mapping[str, Array], keep: Callable[[Array], bool] = lambda array: False
) -> tuple[dict[str, Array], list[Array]]:
    """Role → array of a trusted cut; and of all else that it computes what is to be kept, which at full size is gigabytes."""
    roles = {value: role for role, value in landmarks(cut, layer).items()}
    found: dict[str, Array] = {}
    kept: list[Array] = []

    def observe(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        if value in roles:
            found[roles[value]] = array
        if keep(array):
            kept.append(array)

    run_nodes(cut, feeds, observe=observe)
    return found, kept


def walk(
    cut: ir.Model,
    layer: int | None,
    feeds: Mapping[str, Array],
    trusted: Mapping[str, Array],
    allowed: float | Mapping[str, float],
    *,
    beside: Mapping[str, Array] | None = None,
    keep: Collection[ir.Value] = (),
) -> tuple[list[Tensor], dict[str, Array]]:
    """Run a cut with exact inputs everywhere.

    Args:
        cut: of the graph, its values in the trusted ones' dtype or rounded.
        layer: which; None outside the layers.
        feeds: of the cut.
        trusted: role → array.
        allowed: error of every landmark, or of each.
        beside: value name → what a landmark is compared with; None compares with what it is replaced by.
        keep: further values that are returned.

    Returns:
        The landmarks that have a trusted counterpart, in the order in which they are computed; and they and the kept values by name, as they
        were computed.

    Raises:
        ValidationError: a landmark has no limit.
    """
    roles = {value: role for role, value in landmarks(cut, layer).items()}
    tensors: list[Tensor] = []
    computed: dict[str, Array] = {}

    def replace(value: ir.Value, array: Array) -> Array:
        role = roles.get(value)
        if role is not None or value in keep:
            computed[str(value.name)] = array
        exact = expected_at(role, trusted) if role is not None else None
        if role is None or exact is None or array.dtype.kind != "f":
            return array
        limit = allowed if isinstance(allowed, float) else _limit(role, allowed)
        against = exact if beside is None else beside[str(value.name)]
        tensors.append(Tensor(role, value, position_error(_in_use(value, array, against, feeds), against), limit))
        with np.errstate(over="ignore"):
            return exact.astype(array.dtype, copy=False) if exact.shape == array.shape else array

    run_nodes(cut, feeds, replace=replace)
    return tensors, computed


def _in_use(value: ir.Value, array: Array, against: Array, feeds: Mapping[str, Array]) -> Array:
    """A static cache of ONNX Runtime's own operator with the slots beyond each row's length as ``against`` has them: alone it writes zeros there.

    In one buffer, as graphs are run, it leaves them alone, which ``stray_slots`` holds.
    """
    lengths, node = feeds.get(io_spec.KEY_VALUE_LENGTHS), value.producer()
    if lengths is None or node is None or node.op_type != GROUPED or value is node.outputs[0] or against.shape != array.shape:
        return array
    used = np.arange(array.shape[2]) < lengths[:, None]  # [B, C]
    return np.where(used[:, None, :, None], array, against)


def _limit(role: str, allowed: Mapping[str, float]) -> float:
    """Of a packed projection the largest of its members'."""
    limits = [allowed[name] for name in (role, *PACKED.get(role, ())) if name in allowed]
    if not limits:
        raise ValidationError(f"{role} has no limit: the model's own trace has no such tensor, only {', '.join(sorted(allowed))}")
    return max(limits)
