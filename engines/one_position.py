"""One position a row before lm_head, so that logits are [B, 1, V].

Before:  x [B, S, E] ─ MatMul(lm_head) ─ logits [B, S, V]
Dynamic: x ─ Gather(-1, axis=1) [B, 1, E] ─ MatMul(lm_head) ─ logits [B, 1, V]
Static:  x ─ GatherND(last_token_indices [B] as [B, 1, 1], batch_dims=1) [B, 1, E] ─ MatMul(lm_head) ─ logits [B, 1, V]

A dynamic batch is padded on the left, so each row's last token stands last; a static one on the right, so each row says where its own is. At 2,048
tokens and 32,000 words this saves 262 MB of float16 logits a row.

Gathered early, the position is taken where the last layer stops mixing positions: of its attention's result and of the residual. Then o_proj, the MLP
and the last norm compute one position too: with S of many tokens that is most of a layer's work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from artifact.engine_names import engine_graph
from artifact.errors import EngineError
from artifact.graph_file import load_graph
from artifact.io_spec import BATCH, CACHE_WRITE_INDICES, INPUT_IDS, KEY_VALUE_LENGTHS, LAST_TOKEN_INDICES, LOGITS
from artifact.steps import StepContext

LAST = "last_position"
HIDDEN = "last_hidden_state"
LINEARS = ("MatMul", "MatMulNBits")
NORMS = ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
BY_POSITION = frozenset(("Add", "Mul", "Sigmoid", "Cast", "Split", *NORMS))
"""Operators that compute every position of [B, S, E] by itself where their axis, if they have one, is the last; besides linears."""
AXES = {"Split": 0}
"""Operator → the axis that it has unsaid, where that is not the last."""


def write_one_position(step: StepContext, stage: str) -> dict[str, Any]:
    """Beside a stage for ONNX Runtime, which no `build` follows, write its graph with one position a row, gathered early: what runs a prompt.

    Args:
        step: the artifact; this very step has written the stage.
        stage: ``fused-onnxruntime``; a static cache keeps its symbolic capacity.

    Returns:
        ``one_position``: {file, gathered}: `fused-onnxruntime-engine.onnx`, and the values of which one position goes on.

    Raises:
        EngineError: not a decoder graph whose ``logits`` come from one product over [B, S, E].
    """
    model, name = load_graph(step.artifact / f"{stage}.onnx"), engine_graph(stage)
    gathered = gather_last_position(model.graph, f"{stage}.onnx", early=True)
    with step.write(name) as out:
        ir.save(model, out)
    return {"one_position": {"file": name, "gathered": gathered}}


def gather_last_position(graph: ir.Graph, name: str, *, early: bool = False) -> list[str]:
    """Gather one position a row of lm_head's input, in place.

    Args:
        graph: a decoder's.
        name: for messages.
        early: where positions stop being mixed, and not just before lm_head.

    Returns:
        Names of the values of which it is taken.

    Raises:
        EngineError: ``logits`` do not come from one product of lm_head over [B, S, E].
    """
    logits = next((value for value in graph.outputs if value.name == LOGITS), None)
    if logits is None:
        raise EngineError(f"{name} has no output {LOGITS!r}; it has: {', '.join(str(value.name) for value in graph.outputs)}")
    path = _path_to_linear(logits, name)
    reader = _first_of_casts(path[-1])
    hidden = reader.inputs[0]
    assert hidden is not None
    if hidden.shape is not None and hidden.shape.rank() != 3:
        raise EngineError(f"{name}: the input of {path[-1].name!r} must be [B, S, E], got {hidden.shape}")
    behind = dict.fromkeys([reader, *path])
    if early:
        behind |= dict.fromkeys(_by_position(graph, behind))
    entering = _entering(graph, behind) if early else [hidden]
    index = _given_index(graph, hidden, next(node for node in graph if node in behind)) if is_static(graph) else constant(graph, LAST, -1)
    for number, value in enumerate(entering):
        _gather(graph, value, index, behind, f"_{number}" if number else "")
    for node in behind:
        for output in node.outputs:
            output.shape = _one_position(output.shape)
    return [str(value.name) for value in entering]


def is_static(graph: ir.Graph) -> bool:
    """Whether a graph has a static cache."""
    return any(value.name == CACHE_WRITE_INDICES for value in graph.inputs)


def _by_position(graph: ir.Graph, last: Collection[ir.Node]) -> list[ir.Node]:
    """The nodes that only give to ``last``, directly or not, and compute each position by itself."""
    rows = next(list(value.shape)[:2] for value in graph.inputs if value.name == INPUT_IDS and value.shape is not None)
    found = dict.fromkeys(last)
    for node in reversed(list(graph)):
        readers = [user for output in node.outputs for user in output.consumers()]
        if node not in found and readers and all(user in found for user in readers) and _keeps_positions(node, rows):
            found[node] = None
    return [node for node in found if node not in last]


def _keeps_positions(node: ir.Node, rows: Sequence[int | ir.SymbolicDim]) -> bool:
    """Whether a node computes each position of S by itself, all that it reads and gives being [B, S, …], or weights."""
    if any(output.is_graph_output() for output in node.outputs):
        return False
    of_positions = [value for value in node.inputs if value is not None and not _is_weight(value)]
    if not all(_has_positions(value, rows) for value in (*of_positions, *(output for output in node.outputs if output.uses()))):
        return False
    if node.op_type in LINEARS:
        return of_positions == [node.inputs[0]]
    return node.op_type in BY_POSITION and node.attributes.get_int("axis", AXES.get(node.op_type, -1)) in (-1, 2)


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is stored, transposed or cast or not."""
    node = value.producer()
    return value.const_value is not None if node is None else all(_is_weight(source) for source in node.inputs if source is not None)


def _has_positions(value: ir.Value, rows: Sequence[int | ir.SymbolicDim]) -> bool:
    return value.shape is not None and value.shape.rank() == 3 and list(value.shape)[:2] == rows


def _entering(graph: ir.Graph, nodes: Collection[ir.Node]) -> list[ir.Value]:
    """What nodes read that none of them makes, but for weights; each once, in the order in which they are read."""
    read = (value for node in graph if node in nodes for value in node.inputs if value is not None)
    return list(dict.fromkeys(value for value in read if not _is_weight(value) and value.producer() not in nodes))


def _gather(graph: ir.Graph, value: ir.Value, index: ir.Value, behind: Collection[ir.Node], suffix: str) -> None:
    """One position of a value for some of its readers."""
    first = next(node for node in graph if node in behind and value in node.inputs)
    operator, attributes = ("GatherND", {"batch_dims": 1}) if is_static(graph) else ("Gather", {"axis": 1})
    node = ir.node(operator, [value, index], attributes, name=f"{LAST}{suffix}", metadata_props=dict(first.metadata_props))
    last = node.outputs[0]
    last.name, last.type, last.shape = f"{HIDDEN}{suffix}", value.type, _one_position(value.shape)
    graph.insert_before(first, [node])
    for reader in behind:
        for position, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(position, last)


def _given_index(graph: ir.Graph, hidden: ir.Value, before: ir.Node) -> ir.Value:
    """A new input [B] that says for each row which position, as [B, 1, 1]."""
    batch = hidden.shape[0] if hidden.shape is not None else BATCH
    index = ir.Value(name=LAST_TOKEN_INDICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
    names = [value.name for value in graph.inputs]
    graph.inputs.insert(names.index(KEY_VALUE_LENGTHS) + 1, index)
    axes = constant(graph, f"{LAST}_axes", 1, 2)
    unsqueeze = ir.node("Unsqueeze", [index, axes], name=f"{LAST}_indices", metadata_props=dict(before.metadata_props))
    unsqueeze.outputs[0].type, unsqueeze.outputs[0].shape = index.type, ir.Shape([batch, 1, 1])
    graph.insert_before(before, [unsqueeze])
    return unsqueeze.outputs[0]


def constant(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    """A vector of int64 that becomes one of the graph's."""
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]))
    graph.initializers[name] = value
    return value


def _path_to_linear(logits: ir.Value, name: str) -> list[ir.Node]:
    """From the logits back over casts to the product that makes them."""
    path = []
    node = logits.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        path.append(node)
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None or node.op_type not in LINEARS:
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
