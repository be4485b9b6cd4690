"""Cut an engine graph into parts at layer boundaries, each a graph of its own for one plan, and prove that the parts joined are the graph.

Whole:  inputs ─ shared ─┬─ layer 0 ─ … ─ layer N-1 ─ tail ─ logits
Part k: its inputs ─ shared ─ layers first … last ─ hidden_states.{last + 1}, or tail ─ logits

What all layers share (mask, shapes) is small, and computed in every part. It takes sizes from inputs that a later part lacks: there S is read from
the hidden state and P from the first cache that the part has. In that alone a part's nodes differ from the whole's; the proof takes a size for the
name of its axis, and everything else must be the same computation on the same weights.
Letters: S new tokens, P past, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.io_spec import CACHE_KINDS, INPUT_IDS, GraphValue, hidden_name, past_name, present_layer
from graphs.diff import graph_digests, moved_weights
from graphs.partition import _extract, _hidden_in, _hidden_out, _layer, layer_count, part_boundaries, upstream

Layers = tuple[int, int]
"""First and last, both inside."""


def cut_part(model: ir.Model, layers: Layers) -> ir.Model:
    """One part of an engine graph.

    Args:
        model: the whole; left as it is.
        layers: first and last.

    Returns:
        A model whose inputs and outputs are ``io_spec.part_inputs`` and ``part_outputs``; weights are references to the same data.

    Raises:
        FusionError: a boundary where not just one value crosses, or something shared that a part can't compute from what it has.
    """
    whole = model.clone()
    part_boundaries(whole)
    first, last = layers
    begin = _hidden_in(_nodes(whole, first), first) if first else None
    end = _hidden_out(_nodes(whole, last), last) if last + 1 < layer_count(whole) else None
    own = set(range(first, last + 1))
    outputs = [end] if end is not None else [value for value in whole.graph.outputs if present_layer(str(value.name)) is None]
    outputs += [value for value in whole.graph.outputs if present_layer(str(value.name)) in own]
    if begin is not None:
        _read_sizes_of(whole.graph, begin, first)
    reached = upstream(outputs, stop=begin)
    inputs = [] if begin is None else [begin]
    part = _extract(whole, [*inputs, *(value for value in whole.graph.inputs if value in reached)], outputs)
    _name_hidden(part, None if begin is None else str(begin.name), None if end is None else str(end.name), layers)
    _check_layers(part, own)
    _order_weights(part.graph, list(whole.graph.initializers))
    return part


def parts_differ(whole: ir.Model, parts: Sequence[ir.Model]) -> list[str]:
    """What the parts, joined, compute otherwise than the whole; empty where they are the same.

    Args:
        whole: the engine graph.
        parts: all of them, in order.

    Returns:
        Names of outputs of the whole that no part gives, or that are computed otherwise; and of weights that a part reads from other bytes.
    """
    expected = graph_digests(whole.graph, replace=_axis_digest(whole.graph))
    wanted = {str(value.name): expected[value] for value in whole.graph.outputs}
    known: dict[str, str] = {str(value.name): expected[value] for value in whole.graph.inputs}
    found: dict[str, str] = {}
    for part in parts:
        digests = _digests(part.graph, known)
        given = {str(value.name): digests[value] for value in part.graph.outputs}
        known |= given
        found |= given
    moved = [name for part in parts for name in moved_weights(whole.graph, part.graph) if name in part.graph.initializers]
    return [*(name for name, digest in wanted.items() if found.get(name) != digest), *moved]


def interface_differs(part: ir.Model, inputs: Sequence[GraphValue], outputs: Sequence[GraphValue]) -> list[str]:
    """Names of inputs and outputs that a part has and should not, or the other way round."""
    pairs = ((part.graph.inputs, inputs), (part.graph.outputs, outputs))
    named = [({str(value.name): value for value in found}, {spec.name: spec for spec in wanted}) for found, wanted in pairs]
    return [name for found, wanted in named for name in found.keys() ^ wanted.keys()]


def _digests(graph: ir.Graph, known: dict[str, str]) -> dict[ir.Value, str]:
    """Digests in which an input is what the part before computes for it."""
    return graph_digests(graph, replace=_axis_digest(graph), entering=known)


def _axis_digest(graph: ir.Graph) -> Callable[[ir.Value], str | None]:
    """Of a Shape of an input: the names of its axes, wherever they are read from."""
    inputs = set(graph.inputs)

    def digest(value: ir.Value) -> str | None:
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Shape" else None
        if node is None or source is None or not (source in inputs or _is_hidden(source)):
            return None
        return f"axes {_read_axes(node, source)}"

    return digest


def _read_axes(node: ir.Node, source: ir.Value) -> tuple[str, ...]:
    """The axes that a Shape gives of a value."""
    if source.shape is None:
        raise FusionError(f"{source.name} has no shape, and {node.name} reads it")
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(source.shape))
    axes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in source.shape[start:end]]
    if None in axes:
        raise FusionError(f"axis {start + axes.index(None)} of {source.name} has no name, and {node.name} reads it")
    return tuple(map(str, axes))


def _is_hidden(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and _layer(node) is not None


def _read_sizes_of(graph: ir.Graph, hidden: ir.Value, first: int) -> None:
    """Let sizes come from what the part has: S from its hidden state, P from its first cache."""
    values = {str(value.name): value for value in graph.inputs}
    there = {INPUT_IDS: hidden, **{past_name(0, kind): values[past_name(first, kind)] for kind in CACHE_KINDS}}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Shape" else None
        other = there.get(str(source.name)) if source is not None and source in graph.inputs else None
        if source is None or other is None:
            continue
        before = _read_axes(node, source)
        if before != _read_axes(node, other):
            raise FusionError(f"{node.name} reads {before} of {source.name}, which a later part has not: {other.name} has {_read_axes(node, other)}")
        node.replace_input_with(0, other)


def _name_hidden(part: ir.Model, begin: str | None, end: str | None, layers: Layers) -> None:
    """Give the hidden states the names that parts are joined by."""
    first, last = layers
    for values, old, new in ((part.graph.inputs, begin, hidden_name(first)), (part.graph.outputs, end, hidden_name(last + 1))):
        for value in values:
            if old is not None and value.name == old:
                value.name = new


def _order_weights(graph: ir.Graph, order: list[str]) -> None:
    """List weights as the whole does: a cut finds them by sets, and the same graph must give the same bytes."""
    values = {name: graph.initializers.pop(name) for name in list(graph.initializers)}
    for name in sorted(values, key=order.index):
        graph.initializers[name] = values[name]


def _nodes(model: ir.Model, layer: int) -> list[ir.Node]:
    return [node for node in model.graph if _layer(node) == layer]


def _check_layers(part: ir.Model, own: set[int]) -> None:
    strange = sorted({layer for node in part.graph if (layer := _layer(node)) is not None} - own)
    if strange:
        raise FusionError(f"layers {min(own)} to {max(own)} can't be cut off: they compute something of layer {strange[0]}")
