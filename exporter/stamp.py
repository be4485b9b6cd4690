"""Trace one layer, stamp the rest: replicate the layer of a one-layer trace, and share what does not depend on the layer.

Before:  inputs ─ embedding ─ layer 0 ─ norm ─ lm_head        (shape reads, mask and rotary tables partly inside layer 0)
After:   inputs ─ shared nodes ─ embedding ─ layer 0 ─ … ─ layer N-1 ─ norm ─ lm_head

The cost is linear in the number of nodes written, and the weights are never touched. tests/exporter/test_stamp.py proves the result
isomorphic to a full trace (graphs/diff.py).
"""

from __future__ import annotations

import onnx_ir as ir

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ExportError
from artifact.layout import MODULE_KEY, layer_of, layer_prefix
from artifact.naming import name_by_module


def stamp_layers(traced: ir.Model, config: LlamaConfig) -> ir.Model:
    """Replicate the layer of a one-layer trace.

    Args:
        traced: what ``trace_model`` made of ``config`` with one layer; changed in place.
        config: the model's own config, with all its layers.

    Returns:
        The same model with ``config.num_hidden_layers`` layers; nodes and values are named by module and operator.

    Raises:
        ExportError: the trace does not hold exactly one layer with one hidden state in and one out.
    """
    graph = traced.graph
    layer_nodes = _lift_shared(graph)
    hidden_in, hidden_out = _boundary(graph, layer_nodes)
    after = [(user, index) for user, index in hidden_out.uses() if user not in layer_nodes]
    previous = hidden_out
    for layer in range(1, config.num_hidden_layers):
        previous = _stamp(graph, layer_nodes, layer, hidden_in, previous, hidden_out)
    for user, index in after:
        user.replace_input_with(index, previous)
    graph.sort()
    name_by_module(traced)
    return traced


def _lift_shared(graph: ir.Graph) -> list[ir.Node]:
    """Layer nodes that read neither the hidden state, nor a weight, nor the contents of a cache move out; returns what stays."""
    dependent: set[ir.Value | None] = {value for value in graph.initializers.values() if layer_of(value.name) is not None}
    dependent |= {value for value in graph.inputs if value.name in {io_spec.past_name(0, kind) for kind in io_spec.CACHE_KINDS}}
    dependent |= {value for node in graph if node.metadata_props.get(MODULE_KEY) == "model.embed_tokens" for value in node.outputs}
    layer_nodes = []
    for node in graph:
        if node.op_type == "Shape" or not dependent.intersection(node.inputs):
            if layer_of(node.metadata_props.get(MODULE_KEY)) is not None:
                node.metadata_props[MODULE_KEY] = "model"
            continue
        dependent.update(node.outputs)
        if layer_of(node.metadata_props.get(MODULE_KEY)) is not None:
            layer_nodes.append(node)
    return layer_nodes


def _boundary(graph: ir.Graph, layer_nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """The one hidden state that enters the layer, and the one that leaves it."""
    inside = set(layer_nodes)
    rank = (io_spec.BATCH, io_spec.SEQUENCE)

    def is_hidden(value: ir.Value | None) -> bool:
        return value is not None and value.shape is not None and len(value.shape) == 3 and tuple(map(str, value.shape[:2])) == rank

    entering = {value for node in layer_nodes for value in node.inputs if is_hidden(value) and value is not None and value.producer() not in inside}
    leaving = {value for node in layer_nodes for value in node.outputs for user, _ in value.uses() if user not in inside}
    leaving -= set(graph.outputs)
    if len(entering) != 1 or len(leaving) != 1:
        raise ExportError(f"the traced layer has {len(entering)} hidden states in and {len(leaving)} out; expected one of each")
    return entering.pop(), leaving.pop()


def _stamp(graph: ir.Graph, nodes: list[ir.Node], layer: int, hidden_in: ir.Value, previous: ir.Value, hidden_out: ir.Value) -> ir.Value:
    """Append one copy of the layer that reads ``previous``; returns its hidden state."""
    copies: dict[ir.Value | None, ir.Value | None] = {None: None, hidden_in: previous}
    for kind in io_spec.CACHE_KINDS:
        source = next(value for value in graph.inputs if value.name == io_spec.past_name(0, kind))
        copies[source] = _like(source, io_spec.past_name(layer, kind))
        graph.inputs.append(copies[source])  # type: ignore[arg-type]
    for value in {value: None for node in nodes for value in node.inputs}:
        if value is not None and value.name in graph.initializers and layer_of(value.name) is not None:
            copies[value] = _like(value, _renumber(value.name or "", layer))
            graph.initializers.add(copies[value])  # type: ignore[arg-type]
    for node in nodes:
        outputs = [_like(value, None) for value in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        metadata = {MODULE_KEY: _renumber(node.metadata_props[MODULE_KEY], layer)}
        inputs = [copies.get(value, value) for value in node.inputs]
        graph.append(ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs, metadata_props=metadata))
    for kind in io_spec.CACHE_KINDS:
        present = copies[next(value for value in graph.outputs if value.name == io_spec.present_name(0, kind))]
        graph.outputs.append(_named(present, io_spec.present_name(layer, kind)))
    result = copies[hidden_out]
    assert result is not None
    return result


def _like(value: ir.Value, name: str | None) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _named(value: ir.Value | None, name: str) -> ir.Value:
    assert value is not None
    value.name = name
    return value


def _renumber(name: str, layer: int) -> str:
    return name.replace(layer_prefix(0), layer_prefix(layer), 1)
