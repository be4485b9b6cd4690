"""Range audit: how close every float16 tensor of a graph comes to float16's largest value, 65504.

The graph is run node by node in float32 (``node_runner``), so nothing overflows and every value that the graph stores as float16 is measured:
also those that the reference module never makes (packed, scaled, repeated). Values inside a fused operator are not tensors of the graph.

Not measured, because they are not computed: weights, and the fill values of masks (``masks``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from artifact.layout import MODULE_KEY, layer_of
from artifact.progress import Progress, silent
from validation.masks import find_masks
from validation.node_runner import Array, run_nodes

FLOAT16_MAX = 65504.0
WARN_FRACTION = 0.5
FAR_FRACTION = 0.25
"""Half of what warns: a rounded value is within a thousandth of what was rounded, and a run that strays by a factor of 2 fails as noise."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RangeAudit:
    """Largest |value| of the float16 tensors of one run, as a fraction of 65504; 1.0 and more overflows.

    Attributes:
        peak_fraction: of the worst tensor; NaN or inf where even float32 fails; 0 where the graph has no float16 tensor.
        tensor: its name; empty where the graph has none.
        layer: its layer; None outside the layers.
        per_layer: the worst of each layer.
        warnings: one line for each layer's worst tensor above half of the range.
    """

    peak_fraction: float
    tensor: str
    layer: int | None
    per_layer: list[float]
    warnings: list[str]

    @property
    def is_far(self) -> bool:
        """Whether the worst is so far from overflow that rounding can't have hidden one: a run that rounds tells then what a float32 run would."""
        return self.peak_fraction <= FAR_FRACTION


def audit_ranges(model: ir.Model | Path, feeds: Mapping[str, Array], progress: Progress = silent) -> RangeAudit:
    """Measure every float16 tensor of a graph in a float32 run.

    Args:
        model: a graph, or the path of one.
        feeds: graph input name → array, dtypes as in the graph.
        progress: told the layer that is being run.

    Raises:
        ValidationError: a feed is missing, a weight can't be read, or a node can't be run alone.
    """
    model = ir.load(model) if isinstance(model, Path) else model
    masks = find_masks(model.graph)
    peaks = Peaks()

    def observe(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        if dtype == ir.DataType.FLOAT16:
            peaks.see(node, value, peak(masks.results(value, array)))

    run_nodes(model, feeds, float32=True, observe=observe, progress=progress)
    return peaks.audit()


class Peaks:
    """The largest float16 value of each layer, as the values of a run come by."""

    def __init__(self) -> None:
        self._worst: dict[int | None, tuple[float, str]] = {}

    def see(self, node: ir.Node, value: ir.Value, largest: float) -> None:
        """A float16 value of a node, and the largest |value| that it holds."""
        layer, fraction = layer_of(node.metadata_props.get(MODULE_KEY)), largest / FLOAT16_MAX
        if layer not in self._worst or _severity(fraction) > _severity(self._worst[layer][0]):
            self._worst[layer] = fraction, str(value.name)

    def audit(self) -> RangeAudit:
        """What came by, summed up."""
        return _summary(self._worst)


def peak(array: Array) -> float:
    """Largest |value| of a float16, float32 or float64 array of any shape; inf or NaN where it holds one, 0 where it is empty."""
    if array.dtype not in (np.float16, np.float32):
        return float(np.max(np.abs(array), initial=0.0))
    # without the sign, floats order as their bits do, and NaN > inf > all others: several times faster than isfinite
    integer = np.dtype(f"u{array.dtype.itemsize}")
    bits = np.ascontiguousarray(array).reshape(-1).view(integer)
    magnitude = np.iinfo(integer).max >> 1
    blocks = (bits[start : start + _BLOCK] & integer.type(magnitude) for start in range(0, bits.size, _BLOCK))
    largest = max((block.max() for block in blocks), default=integer.type(0))
    return float(np.asarray(largest, dtype=integer).view(array.dtype))


def _summary(worst: Mapping[int | None, tuple[float, str]]) -> RangeAudit:
    if not worst:
        return RangeAudit(0.0, "", None, [], [])
    layers = [layer for layer in worst if layer is not None]
    layer = max(worst, key=lambda layer: _severity(worst[layer][0]))
    per_layer = [worst.get(index, (0.0, ""))[0] for index in range(max(layers, default=-1) + 1)]
    warnings = [_warning(worst[index], index) for index in sorted(worst, key=lambda index: -1 if index is None else index)]
    return RangeAudit(*worst[layer], layer, per_layer, [line for line in warnings if line])


def _severity(fraction: float) -> float:
    return math.inf if math.isnan(fraction) else fraction


def _warning(entry: tuple[float, str], layer: int | None) -> str:
    fraction, tensor = entry
    if fraction <= WARN_FRACTION:
        return ""
    where = "outside the layers" if layer is None else f"layer {layer}"
    return f"{where}: {tensor} reaches {fraction * FLOAT16_MAX:,.0f}, {fraction:.0%} of float16's largest value"
