"""Strict mode: run a float16 graph so that every operation truly rounds to float16.

ONNX Runtime on CPU computes a whole float16 graph in float32, and a graph that overflows on a GPU passes there. Run node by node
(``node_runner``), each operation rounds its result, and an overflow is an inf that is named. An engine fuses operations and rounds less often:
the error measured here is a pessimistic bound for it. Products of int8 by int8 are computed as its kernels do (``integer_products``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from artifact.layout import MODULE_KEY, layer_of
from artifact.progress import Progress, silent
from graphs.diff import describe_node
from validation.integer_products import with_integer_products
from validation.masks import FLOATS, find_masks
from validation.node_runner import Array, run_nodes
from validation.ranges import Peaks, RangeAudit, peak


@dataclass(frozen=True)
class StrictRun:
    """What a strict run computed.

    Attributes:
        outputs: graph outputs and kept values by name, dtypes as in the graph.
        nonfinite: how many results hold NaN or inf; one overflow makes many.
        first_nonfinite: ``name (operator, module): what`` of the first node whose result holds NaN or inf; None if there is none.
        first_nonfinite_layer: its layer; None if there is none, or the node is outside the layers.
        ranges: largest float16 values of the rounded run; None where islands were rewritten, whose values are not all the graph's.
    """

    outputs: dict[str, Array]
    nonfinite: int = 0
    first_nonfinite: str | None = None
    first_nonfinite_layer: int | None = None
    ranges: RangeAudit | None = field(default=None, repr=False)


def run_strict(model: ir.Model | Path, feeds: Mapping[str, Array], *, keep: Collection[str] = (), progress: Progress = silent) -> StrictRun:
    """Run a graph node by node, every result rounded to the dtype that the graph gives it.

    Args:
        model: a graph, or the path of one.
        feeds: graph input name → array, dtypes as in the graph (``io_spec``).
        keep: names of further values to return.
        progress: told the layer that is being run.

    Returns:
        The outputs, and where the first NaN or inf was made. A mask's own -inf does not count (``masks``).

    Raises:
        ValidationError: a feed is missing, a weight can't be read, or a node can't be run alone.
    """
    written = ir.load(model) if isinstance(model, Path) else model
    model = with_integer_products(written)
    masks, peaks = find_masks(model.graph), Peaks()
    found: list[tuple[ir.Node, str]] = []

    def observe(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        if dtype not in FLOATS:
            return
        largest = peak(masks.results(value, array))
        if dtype == ir.DataType.FLOAT16:
            peaks.see(node, value, largest)
        if not math.isfinite(largest):
            found.append((node, f"{'NaN' if math.isnan(largest) else 'inf'} in {value.name} {dtype.name}{list(array.shape)}"))

    outputs = run_nodes(model, feeds, keep=keep, observe=observe, progress=progress)
    ranges = peaks.audit() if model is written else None
    if not found:
        return StrictRun(outputs, ranges=ranges)
    node, what = found[0]
    return StrictRun(outputs, len(found), f"{describe_node(node)}: {what}", layer_of(node.metadata_props.get(MODULE_KEY)), ranges)
