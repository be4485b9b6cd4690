"""The trusted counterpart of a graph: the model's own trace, made again, in float32.

It is cut as the graph is, given the weights that the graph computes with, and run node by node on the same inputs. So it differs from a sound
graph by the order of sums alone, whatever the graph's weights were rounded to; the weights are held against the checkpoint's by themselves. That the
trace is the model is not taken on trust either (proof.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache
from artifact.progress import Progress
from exporter.stamp import stamp_layers
from exporter.trace_cache import traced_layer
from graphs.partition import cut_layer, cut_shared, cut_tail
from validation.bisect.promoted import in_float32

Array = NDArray[Any]


class Trusted:
    """The trace of a model in pieces, with float32 values.

    Args:
        config, dtype, kv_cache: of the artifact; constants are rounded to the dtype as its graphs round them.
    """

    def __init__(self, config: LlamaConfig, dtype: Dtype, kv_cache: KvCache, progress: Progress) -> None:
        layer, _ = traced_layer(config, dtype, kv_cache, progress=progress)
        self.model = stamp_layers(layer, config)

    def shared(self, weights: Mapping[str, Array | ir.TensorProtocol]) -> ir.Model:
        """What all layers share."""
        return _with_weights(cut_shared(self.model), weights)

    def layer(self, index: int, weights: Mapping[str, Array]) -> ir.Model:
        """One layer."""
        return _with_weights(cut_layer(self.model, index), weights)

    def tail(self, weights: Mapping[str, Array]) -> ir.Model:
        """What follows the layers."""
        return _with_weights(cut_tail(self.model), weights)


def _with_weights(cut: ir.Model, weights: Mapping[str, Array | ir.TensorProtocol]) -> ir.Model:
    model = in_float32(cut)
    for name, value in model.graph.initializers.items():
        if name in weights:
            given = weights[name]
            value.const_value = ir.tensor(given, name=name) if isinstance(given, np.ndarray) else given
    return model
