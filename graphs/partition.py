"""Cut a graph at layer boundaries: what all layers share, one layer, and what follows the last.

Whole:  inputs ─ shared ─┬─ layer 0 ─ layer 1 ─ … ─ layer N-1 ─ tail ─ logits
                         └─ mask, rotary values, shapes for every layer
Cuts:   shared: graph inputs → the embedded tokens, and every shared value that a layer reads
        layer:  hidden state, shared values, its past → hidden state, its presents
        tail:   hidden state (and shared values) → logits

Values keep their names, so cuts are joined by name: run the shared cut, then the layers in order, then the tail. Weights stay references to
the same external data. A layer's nodes are those whose metadata name it (``artifact.layout.MODULE_KEY``); nothing else is assumed of them,
so traced, fused and quantised graphs are cut alike. Where one node ends a layer and begins the next, ``part_boundaries`` makes two of it first.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.layout import EMBEDDING, MODULE_KEY, layer_of, layer_prefix

SKIP_NORM, SKIP_SUM = "SkipSimplifiedLayerNormalization", 3
"""ONNX Runtime's residual sum and norm in one node, and which of its outputs is the sum."""


def layer_count(model: ir.Model) -> int:
    """Number of decoder layers, by their nodes' metadata.

    Raises:
        FusionError: no node names a layer, or the layers are not numbered 0, 1, ….
    """
    layers = {layer for node in model.graph if (layer := _layer(node)) is not None}
    if not layers:
        raise FusionError(f"no node of the graph names its layer in its metadata ({MODULE_KEY!r}), so it can't be cut", hint="export again")
    missing = set(range(max(layers) + 1)) - layers
    if missing:
        raise FusionError(f"the graph has nodes of layer {max(layers)}, but none of layer {min(missing)}")
    return len(layers)


def part_boundaries(model: ir.Model) -> int:
    """Part each residual sum from the norm of the next layer (or the tail) that computes it, in place; returns how many.

    Before:  SkipSimplifiedLayerNormalization(x, y, weight) of layer i+1 → normed, sum       x and y are of layer i
    After:   sum = Add(x, y) of layer i;  RMSNormalization(sum, weight) of layer i+1 → normed

    The norm then reads the sum as it is stored: in float16 it is rounded once more than in the one node.
    """
    parted = 0
    for node in [node for node in model.graph if node.op_type == SKIP_NORM]:
        x, y, weight = node.inputs[:3]
        before = max((layer for value in (x, y) if (layer := _layer_of_value(value)) is not None), default=None)
        if before is None or before == _layer(node):
            continue
        module = {MODULE_KEY: layer_prefix(before)}
        total = ir.node("Add", [x, y], metadata_props=module, name=f"{node.name}.sum")
        normed = ir.node("RMSNormalization", [total.outputs[0], weight], {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-5)})
        normed.name, normed.metadata_props[MODULE_KEY] = node.name, node.metadata_props.get(MODULE_KEY, "")
        olds = [node.outputs[0], *node.outputs[SKIP_SUM:]]
        news = [normed.outputs[0], total.outputs[0]][: len(olds)]
        for old, new in zip(olds, news, strict=True):
            new.name, new.type, new.shape = old.name or f"{node.name}.sum", old.type or node.outputs[0].type, old.shape or node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [total, normed], olds, news)
        parted += 1
    return parted


def _layer_of_value(value: ir.Value | None) -> int | None:
    node = value.producer() if value is not None else None
    return _layer(node) if node is not None else None


def cut_layer(model: ir.Model, layer: int) -> ir.Model:
    """One decoder layer as a model of its own.

    Returns:
        A model whose first input and first output are the hidden state [B, S, E]; the other inputs are shared values and graph inputs
        (its past, position_ids) in the order in which they are first read, the other outputs its presents.

    Raises:
        FusionError: the layer does not have one hidden state in and one out; what was found is named.
    """
    nodes = [node for node in model.graph if _layer(node) == layer]
    if not nodes:
        raise FusionError(f"the graph has no nodes of layer {layer}; it has {layer_count(model)} layers")
    hidden_in, hidden_out = _hidden_in(nodes, layer), _hidden_out(nodes, layer)
    others = [value for value in _entering(nodes) if value is not hidden_in]
    presents = [value for value in model.graph.outputs if value.producer() in set(nodes) and value is not hidden_out]
    return _extract(model, [hidden_in, *others], [hidden_out, *presents])


def cut_shared(model: ir.Model) -> ir.Model:
    """What the layers read and no layer computes: the embedded tokens, and mask, rotary values and shapes.

    Returns:
        A model that reads the graph's own inputs; the first output is the embedded tokens [B, S, E].

    Raises:
        FusionError: a value that layers read belongs to no layer but is computed from one.
    """
    inside = [node for node in model.graph if _layer(node) is not None]
    first = _hidden_in([node for node in inside if _layer(node) == 0], 0)
    shared = [value for value in _entering(inside) if value is not first and value not in model.graph.inputs]
    reached = upstream([first, *shared])
    late = [producer for value in reached if (producer := value.producer()) is not None and _layer(producer) is not None]
    if late:
        raise FusionError(f"values that all layers share must not depend on a layer; they do on {_describe(late[0])}")
    return _extract(model, [value for value in model.graph.inputs if value in reached], [first, *shared])


def cut_tail(model: ir.Model) -> ir.Model:
    """What follows the last layer: final norm and lm_head.

    Returns:
        A model whose first input is the last hidden state [B, S, E] and whose outputs are the graph's, without the presents.

    Raises:
        FusionError: as in ``cut_layer``.
    """
    last = layer_count(model) - 1
    nodes = [node for node in model.graph if _layer(node) == last]
    hidden = _hidden_out(nodes, last)
    outputs = [value for value in model.graph.outputs if (node := value.producer()) is not None and _layer(node) is None]
    reached = upstream(outputs, stop=hidden)
    return _extract(model, [hidden, *(value for value in model.graph.inputs if value in reached)], outputs)


def hidden_states(model: ir.Model) -> list[str]:
    """Names of the values that hold the hidden state after each layer, as far as the graph has them as values of its own.

    Raises:
        FusionError: as in ``cut_layer``.
    """
    parted = model.clone()
    part_boundaries(parted)
    found = [_hidden_out([node for node in parted.graph if _layer(node) == layer], layer).name for layer in range(layer_count(parted))]
    there = {value.name for node in model.graph for value in node.outputs}
    return [name for name in found if name is not None and name in there]


def _layer(node: ir.Node) -> int | None:
    return layer_of(node.metadata_props.get(MODULE_KEY))


def _hidden_in(nodes: list[ir.Node], layer: int) -> ir.Value:
    """The one value that enters from the layer before, or the embedded tokens."""
    embedding = EMBEDDING.removesuffix(".weight")
    source = embedding if layer == 0 else layer_prefix(layer - 1)
    found = []
    for value in _entering(nodes):
        producer = value.producer()
        if producer is not None and (_layer(producer) is not None or (layer == 0 and producer.metadata_props.get(MODULE_KEY) == embedding)):
            found.append((value, producer))
    if len(found) != 1 or _layer(found[0][1]) != (None if layer == 0 else layer - 1):
        raise FusionError(f"layer {layer} must read one value of {source}, its hidden state; it reads {_listed(producer for _, producer in found)}")
    return found[0][0]


def _hidden_out(nodes: list[ir.Node], layer: int) -> ir.Value:
    """The one value of a layer that other nodes read."""
    inside = set(nodes)
    leaving = [value for node in nodes for value in node.outputs if any(user not in inside for user, _ in value.uses())]
    if len(leaving) != 1:
        names = _listed(producer for value in leaving if (producer := value.producer()) is not None)
        raise FusionError(f"layer {layer} must give one value to what follows, the hidden state; it gives those of {names}")
    return leaving[0]


def _entering(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """Values that nodes read and none of them computes, without initializers, in the order of first use."""
    inside = set(nodes)
    read = {value: None for node in nodes for value in node.inputs if value is not None}
    return [value for value in read if not value.is_initializer() and value.producer() not in inside]


def upstream(values: Iterable[ir.Value], stop: ir.Value | None = None) -> set[ir.Value]:
    """The values and whatever they are computed from; the search does not go beyond ``stop``."""
    reached: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in reached or value is stop:
            continue
        reached.add(value)
        producer = value.producer()
        stack += [operand for operand in (producer.inputs if producer else ()) if operand is not None]
    return reached


def _extract(model: ir.Model, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    try:
        graph = ir.convenience.extract(model.graph, inputs, outputs)
    except ValueError as error:
        raise FusionError(f"the graph can't be cut between {inputs[0].name if inputs else 'its inputs'} and {outputs[0].name}: {error}") from error
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _listed(nodes: Iterable[ir.Node]) -> str:
    return ", ".join(map(_describe, nodes)) or "none"


def _describe(node: ir.Node) -> str:
    return f"{node.name or '?'} ({node.op_type}, {node.metadata_props.get(MODULE_KEY) or 'no module'})"
