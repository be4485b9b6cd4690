"""The graph that is built: a stage with one position a row before lm_head; a static cache's capacity is a number.

Nothing else changes but decode's second form, where the engine has one (``decode_gemv``), and external data stays where it is.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from artifact.errors import EngineError
from artifact.graph_file import load_graph
from artifact.io_spec import CAPACITY
from engines.decode_gemv import add_gemv
from engines.one_position import gather_last_position, is_static


def write_engine_graph(stage: Path, out: Path, *, capacity: int | None = None, decode_gemv: bool = False) -> None:
    """Write the engine graph of a stage beside it (external data is found by name relative to the folder).

    Args:
        stage: ``fused.onnx``, ``int8.onnx``, ``traced.onnx``.
        out: a path in the same folder.
        capacity: slots of a static cache, which the graph is fixed to; None for a dynamic one.
        decode_gemv: as ``decode_gemv.add_gemv``.

    Raises:
        EngineError: not a decoder graph whose ``logits`` come from one MatMul over [B, S, E], or a capacity that it has no use for, or lacks; or no
            linears for ``decode_gemv``.
    """
    model = load_graph(stage)
    gather_last_position(model.graph, stage.name)
    if is_static(model.graph) != (capacity is not None):
        form = "a static cache, which needs a capacity" if capacity is None else "a dynamic cache, which has no capacity"
        raise EngineError(f"{stage.name} has {form}")
    if capacity is not None:
        fix_capacity(model.graph, capacity)
    if decode_gemv:
        add_gemv(model.graph, stage.name)
    ir.save(model, out)


def fix_capacity(graph: ir.Graph, capacity: int) -> None:
    """Write a number in the place of the symbolic capacity of a static cache, in every shape; TensorRT updates caches of fixed shapes alone."""
    values = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([capacity if isinstance(size, ir.SymbolicDim) and size.value == CAPACITY else size for size in value.shape])
