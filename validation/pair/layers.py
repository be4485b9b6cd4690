"""Where two graphs of one model part: every layer of both, fed what enters it in the first.

    difference of layer i = ‖second's layer i(x) − first's layer i(x)‖ ÷ ‖first's layer i(x)‖, the mean over positions; x enters layer i in the first

Each layer starts from the same x, so a layer that differs shows at its own place; equal layers differ by 0 exactly. One layer of each is in memory.
Letters: L tokens, E hidden, N layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact import io_spec
from artifact.errors import FusionError
from artifact.progress import Progress, silent
from graphs.joined import Cuts, cut_graph
from validation.float16_costs import relative_errors
from validation.local_ratio import TOKENS, prefill_feeds, run_layer
from validation.node_runner import run_nodes

ROUNDINGS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.FLOAT: 1e-5}
"""Two roundings of the hidden state: layers that differ by less compute the same, in another order."""


@dataclass(frozen=True)
class LayerDifferences:
    """What two graphs differ by.

    Attributes:
        embedding: of what enters the first layer.
        layers: of each layer's output [N].
        rounding: what rounding alone may give.
    """

    embedding: float
    layers: list[float]
    rounding: float

    def as_report(self) -> dict[str, Any]:
        """embedding, layers, rounding, identical (layers), first (beyond rounding) and worst with its multiple of the median."""
        beyond = [layer for layer, difference in enumerate(self.layers) if not difference <= self.rounding]
        worst, median = int(np.argmax(self.layers)), float(np.median(self.layers))
        return {
            "embedding": self.embedding,
            "layers": self.layers,
            "rounding": self.rounding,
            "identical": self.layers.count(0.0),
            "first": beyond[0] if beyond else None,
            "worst": worst if self.layers[worst] != 0 else None,
            "times_median": self.layers[worst] / median if median else None,
        }


def layer_differences(first: Path, second: Path, ids: NDArray[np.int64], progress: Progress = silent) -> LayerDifferences:
    """Run the layers of two graphs on the same hidden states.

    Args:
        first, second: graphs of this toolkit's making, of any precision and cache form.
        ids: token ids [L]; the first ``TOKENS`` are used.
        progress: told which layer runs.

    Raises:
        FusionError: a graph can't be cut at its layers.
        ValidationError: ONNX Runtime can't run a layer alone.
    """
    cuts = cut_graph(ir.load(first)), cut_graph(ir.load(second))
    if len(cuts[0].layers) != len(cuts[1].layers):
        raise FusionError(f"{first.name} names {len(cuts[0].layers)} layers, {second.name} {len(cuts[1].layers)}")
    feeds = [_shared(one, ids[:TOKENS]) for one in cuts]
    entering = [feed.pop(str(one.shared.graph.outputs[0].name)) for one, feed in zip(cuts, feeds, strict=True)]
    embedding = _difference(entering[1], entering[0])
    state, found = entering[0], list[float]()
    for index, pair in enumerate(zip(cuts[0].layers, cuts[1].layers, strict=True)):
        progress(f"{first.stem} and {second.stem}, one layer at a time", index, len(cuts[0].layers))
        ours, theirs = (run_layer(layer, index, state.astype(_dtype(layer).numpy()), feed) for layer, feed in zip(pair, feeds, strict=True))
        found.append(_difference(theirs, ours))
        state = ours
    widest = max((ROUNDINGS.get(_dtype(one.layers[0]), 0.0) for one in cuts), default=0.0)
    return LayerDifferences(embedding, found, widest)


def _shared(cuts: Cuts, ids: NDArray[np.int64]) -> dict[str, Any]:
    """All that layers read but their hidden state, and the embedded tokens."""
    feeds = prefill_feeds(cuts.whole, len(ids)) | {io_spec.INPUT_IDS: ids[None]}
    return feeds | run_nodes(cuts.shared, feeds)


def _dtype(layer: ir.Model) -> ir.DataType:
    dtype = layer.graph.inputs[0].dtype
    assert dtype is not None
    return dtype


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Of [1, L, E] from [1, L, E]."""
    return relative_errors([ours[0]], [theirs[0].astype(np.float32)])[0]
