"""What each kind of operator adds to a layer's error: the layer rounded after every operation, beside the same layer in float32, value by value.

    error of a value = root mean square of (rounded − float32) ÷ that of float32
    added by a node  = error of its output − the largest error that enters it, at least 0

Both run node by node (``node_runner``) from the reference's hidden state. Weights are read as the graph stores them, so what quantisation took from
them is not seen here; that is the local ratio's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.diff import describe_node
from graphs.partition import cut_layer, part_boundaries
from validation.integer_products import with_integer_products
from validation.local_ratio import TOKENS, shared_feeds
from validation.masks import FLOATS
from validation.metrics import relative_error
from validation.node_runner import Array, run_nodes

SAMPLE = 1 << 20
"""Elements of a value that are compared; those of a whole turned or dequantised weight of every linear would be a gigabyte."""


def op_errors(graph: Path, layer: int, entering: Array) -> dict[str, Any]:
    """Run one layer twice.

    Args:
        graph: of a float16 artifact.
        layer: which.
        entering: the reference's hidden state [L, E] float32 from position 0; the first ``TOKENS`` positions are used.

    Returns:
        layer, error (of the hidden state that leaves it) and kinds: [{op, nodes, added, worst, where}], the largest sum of additions first.

    Raises:
        FusionError: the graph can't be cut at its layers.
        ValidationError: a weight can't be read, or ONNX Runtime can't run a node alone.
    """
    model = with_integer_products(ir.load(graph))
    part_boundaries(model)
    cut, state = cut_layer(model, layer), entering[:TOKENS]
    feeds = shared_feeds(model, len(state)) | {str(cut.graph.inputs[0].name): state.astype(np.float16)[None]}
    rounded: dict[str, Array] = {}
    errors: dict[str, float] = {}

    def remember(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        if dtype in FLOATS:
            rounded[str(value.name)] = _sample(array)

    def compare(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        if dtype in FLOATS:
            error = relative_error(rounded.pop(str(value.name)), _sample(array))
            errors[str(value.name)] = math.inf if math.isnan(error) else error

    run_nodes(cut, feeds, observe=remember)
    run_nodes(cut, feeds, float32=True, observe=compare)
    return {"layer": layer, "error": errors[str(cut.graph.outputs[0].name)], "kinds": _by_kind(cut, errors)}


def _by_kind(cut: ir.Model, errors: Mapping[str, float]) -> list[dict[str, Any]]:
    added: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for node in cut.graph:
        given = [errors[str(value.name)] for value in node.outputs if value.name in errors]
        if given:
            read = max((errors.get(str(value.name), 0.0) for value in node.inputs if value is not None), default=0.0)
            more = 0.0 if math.isinf(read) else max(0.0, max(given) - read)  # what came in beyond all bounds is not this node's
            added[node.op_type].append((more, describe_node(node)))
    kinds = [
        {"op": op, "nodes": len(found), "added": sum(value for value, _ in found), "worst": max(found)[0], "where": max(found)[1]}
        for op, found in added.items()
    ]
    return sorted(kinds, key=lambda kind: -float(str(kind["added"])))


def _sample(array: Array) -> Array:
    return array.reshape(-1)[:SAMPLE].copy() if array.size > SAMPLE else array
