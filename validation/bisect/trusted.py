"""The trusted counterpart of a graph: the model's own trace, made again, in float32.

It is cut as the graph is, given the weights that the graph computes with, and run node by node on the same inputs. So it differs from a sound
graph by the order of sums alone, whatever the graph's weights were rounded to; the weights are held against the checkpoint's by themselves. That the
trace is the model is not taken on trust either (proof.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache
from artifact.layout import EMBEDDING
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

    def shared(self, tables: Mapping[str, Array], embedding: ir.TensorProtocol | None) -> ir.Model:
        """What all layers share; the embedding stays where it lies."""
        cut = with_weights(in_float32(cut_shared(self.model)), tables)
        if embedding is not None:
            cut.graph.initializers[EMBEDDING].const_value = embedding
        return cut

    def layer(self, index: int, weights: Mapping[str, Array]) -> ir.Model:
        """One layer, which reads its weights when it is run."""
        return with_weights(in_float32(cut_layer(self.model, index)), weights)

    def tail(self, weights: Mapping[str, Array]) -> ir.Model:
        """What follows the layers."""
        return with_weights(in_float32(cut_tail(self.model)), weights)

    def rounded_layer(self, index: int, weights: Mapping[str, Array]) -> ir.Model:
        """One layer in the artifact's dtype."""
        return with_weights(cut_layer(self.model, index), weights)


def with_weights(cut: ir.Model, weights: Mapping[str, Array]) -> ir.Model:
    """Let a cut read its weights from a mapping, in the dtype that it has them in: the graph itself keeps none (``promoted.in_float32``)."""
    for name, value in cut.graph.initializers.items():
        if name in weights and value.dtype is not None:
            value.const_value = ir.LazyTensor(partial(_read, weights, name, value.dtype), value.dtype, ir.Shape(weights[name].shape), name=name)
    return cut


def _read(weights: Mapping[str, Array], name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):
        return ir.tensor(weights[name].astype(dtype.numpy(), copy=False), name=name)
