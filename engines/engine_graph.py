"""The graph that is built: a stage with one position a row gathered before lm_head, so that logits are [B, 1, V].

Before:   x [B, S, E] ─ MatMul(lm_head) ─ logits [B, S, V]
Dynamic:  x ─ Gather(-1, axis=1) [B, 1, E] ─ MatMul(lm_head) ─ logits [B, 1, V]
Static:   x ─ GatherND(last_token_indices [B] as [B, 1, 1], batch_dims=1) [B, 1, E] ─ MatMul(lm_head) ─ logits [B, 1, V]; the capacity is a number

A dynamic batch is padded on the left, so each row's last token stands last; a static one on the right, so each row says where its own is. Nothing
else changes unless it is asked for (``decode_gemv``), and external data stays where it is. At 2,048 tokens and 32,000 words this saves 262 MB of
logits a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from artifact.errors import EngineError
from artifact.graph_file import load_graph
from artifact.io_spec import BATCH, CAPACITY, KEY_VALUE_LENGTHS, LAST_TOKEN_INDICES, LOGITS
from engines.decode_gemv import add_gemv
from engines.static_checks import is_static

LAST = "last_position"
HIDDEN = "last_hidden_state"


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


def gather_last_position(graph: ir.Graph, name: str) -> None:
    """Gather one position a row of lm_head's input, in place; ``name`` is for messages."""
    logits = next((value for value in graph.outputs if value.name == LOGITS), None)
    if logits is None:
        raise EngineError(f"{name} has no output {LOGITS!r}; it has: {', '.join(str(value.name) for value in graph.outputs)}")
    path = _path_to_matmul(logits, name)
    reader = _first_of_casts(path[-1])
    hidden = reader.inputs[0]
    assert hidden is not None
    if hidden.shape is not None and hidden.shape.rank() != 3:
        raise EngineError(f"{name}: the input of {path[-1].name!r} must be [B, S, E], got {hidden.shape}")
    nodes = _gather_given(graph, hidden) if is_static(graph) else _gather_last(graph, hidden)
    last = nodes[-1].outputs[0]
    last.name, last.type, last.shape = HIDDEN, hidden.type, _one_position(hidden.shape)
    for node in nodes:
        node.metadata_props.update(reader.metadata_props)
    graph.insert_before(reader, nodes)
    reader.replace_input_with(0, last)
    for node in {reader: None, **dict.fromkeys(path)}:
        node.outputs[0].shape = _one_position(node.outputs[0].shape)


def fix_capacity(graph: ir.Graph, capacity: int) -> None:
    """Write a number in the place of the symbolic capacity of a static cache, in every shape; TensorRT updates caches of fixed shapes alone."""
    values = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([capacity if isinstance(size, ir.SymbolicDim) and size.value == CAPACITY else size for size in value.shape])


def _gather_last(graph: ir.Graph, hidden: ir.Value) -> list[ir.Node]:
    """The last of S."""
    return [ir.node("Gather", [hidden, _constant(graph, LAST, -1)], {"axis": 1}, name=LAST)]


def _gather_given(graph: ir.Graph, hidden: ir.Value) -> list[ir.Node]:
    """The one of S that a new input [B] says for each row."""
    batch = hidden.shape[0] if hidden.shape is not None else BATCH
    index = ir.Value(name=LAST_TOKEN_INDICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
    names = [value.name for value in graph.inputs]
    graph.inputs.insert(names.index(KEY_VALUE_LENGTHS) + 1, index)
    unsqueeze = ir.node("Unsqueeze", [index, _constant(graph, f"{LAST}_axes", 1, 2)], name=f"{LAST}_indices")
    unsqueeze.outputs[0].type, unsqueeze.outputs[0].shape = index.type, ir.Shape([batch, 1, 1])
    return [unsqueeze, ir.node("GatherND", [hidden, unsqueeze.outputs[0]], {"batch_dims": 1}, name=LAST)]


def _constant(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]))
    graph.initializers[name] = value
    return value


def _path_to_matmul(logits: ir.Value, name: str) -> list[ir.Node]:
    """From the logits back over casts to the MatMul that makes them."""
    path = []
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        path.append(node)
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type != "MatMul":
        raise EngineError(f"{name}: {LOGITS!r} must come from one MatMul, got {node.op_type if node is not None else 'a graph input'}")
    return [*path, node]


def _first_of_casts(linear: ir.Node) -> ir.Node:
    """The node that reads what the linear multiplies before it is cast: a cast, or the linear itself."""
    node = linear
    while (before := node.inputs[0]) is not None and (cast := before.producer()) is not None and cast.op_type == "Cast":
        node = cast
    return node


def _one_position(shape: ir.Shape | None) -> ir.Shape | None:
    """[B, S, …] → [B, 1, …]."""
    return None if shape is None else ir.Shape([shape[0], 1, *shape[2:]])
