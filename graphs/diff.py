"""Compare two graphs by structure: are they the same computation on the same weights?

Every value gets a digest of how it is computed: operator, attributes and the digests of its inputs; a graph input counts by name, a weight in a
file by its initializer name, a constant in the graph by its bytes. So value names, node order, duplicated constants, shared or repeated nodes and
exporter metadata make no difference, and a changed edge, attribute, constant or weight name does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from artifact.layout import MODULE_KEY


@dataclass(frozen=True)
class GraphDifference:
    """What two graphs do not share; empty lists and equal outputs mean isomorphic.

    Attributes:
        outputs: names of outputs that are computed differently, or that only one graph has.
        only_left, only_right: ``name (op, module)`` of nodes whose digest the other graph lacks, in topological order.
    """

    outputs: list[str] = field(default_factory=list)
    only_left: list[str] = field(default_factory=list)
    only_right: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the graphs are the same computation."""
        return not (self.outputs or self.only_left or self.only_right)


def compare_graphs(left: ir.Model, right: ir.Model) -> GraphDifference:
    """Compare two graphs, node by node.

    Returns:
        The difference; a node downstream of a difference differs too, so the first of each list is where to look.
    """
    left_digests, right_digests = graph_digests(left.graph), graph_digests(right.graph)
    outputs = []
    left_outputs = {value.name: left_digests[value] for value in left.graph.outputs}
    right_outputs = {value.name: right_digests[value] for value in right.graph.outputs}
    for name in left_outputs | right_outputs:
        if left_outputs.get(name) != right_outputs.get(name):
            outputs.append(str(name))
    return GraphDifference(outputs, _lacking(left, left_digests, right_digests), _lacking(right, right_digests, left_digests))


def moved_weights(left: ir.Graph, right: ir.Graph) -> list[str]:
    """Names of external weights that the two graphs read from different bytes, or that only one reads; ``compare_graphs`` goes by names alone."""
    left_places, right_places = external_places(left), external_places(right)
    return [name for name in left_places | right_places if left_places.get(name) != right_places.get(name)]


def external_places(graph: ir.Graph) -> dict[str, tuple[str, int | None, int | None]]:
    """Weight → file, offset, length."""
    external = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: (str(tensor.location), tensor.offset, tensor.length) for name, tensor in external.items() if isinstance(tensor, ir.ExternalTensor)}


def graph_digests(
    graph: ir.Graph, *, entering: Mapping[str, str] | None = None, replace: Callable[[ir.Value], str | None] = lambda value: None
) -> dict[ir.Value, str]:
    """Digest of how each value of a graph is computed.

    Args:
        graph: sorted topologically.
        entering: graph input → digest of what another graph computes for it; others count by name.
        replace: gives a digest of its own to a value, for comparing modulo one edit; None leaves it.
    """
    given = entering or {}
    digests: dict[ir.Value, str] = {value: given.get(str(value.name)) or _digest("input", str(value.name)) for value in graph.inputs}
    for value in graph.initializers.values():
        digests[value] = _digest("initializer", _constant_key(value))
    for node in graph:
        operands = [digests[value] if value is not None else "" for value in node.inputs]
        base = _digest(node.domain, node.op_type, *_attribute_keys(node), *operands)
        for index, value in enumerate(node.outputs):
            digests[value] = replace(value) or _digest(base, str(index))
    return digests


def _lacking(model: ir.Model, own: dict[ir.Value, str], others: dict[ir.Value, str]) -> list[str]:
    known = set(others.values())
    return [describe_node(node) for node in model.graph if not known.issuperset(own[value] for value in node.outputs)]


def describe_node(node: ir.Node) -> str:
    """``name (operator, module)``."""
    module = node.metadata_props.get(MODULE_KEY)
    return f"{node.name or '?'} ({node.op_type}{', ' + module if module else ''})"


def _constant_key(value: ir.Value) -> str:
    tensor = value.const_value
    name = str(value.name)
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return f"{name} {value.dtype} {value.shape}"
    return _tensor_key(tensor)


def _tensor_key(tensor: ir.TensorProtocol) -> str:
    """What a tensor in the graph is, whatever its size."""
    return f"{tensor.dtype} {tensor.shape} {hashlib.sha256(tensor.tobytes()).hexdigest()}"


def _attribute_keys(node: ir.Node) -> list[str]:
    return [f"{name}={_attribute_text(attribute)}" for name, attribute in sorted(node.attributes.items())]


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor_key(attribute.as_tensor())
    return repr(attribute.value)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
