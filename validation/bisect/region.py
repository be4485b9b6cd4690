"""From a landmark that is wrong to the node: which of the nodes between it and the landmarks before it departs from the trusted layer.

All of them had exact inputs. A node's output is *known* where the trusted layer has the same numbers, in whatever layout. From the wrong landmark
back through values that are not known, the first node is where the numbers part. Where one is spelled otherwise than in the other layers, it is it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.layout import MODULE_KEY, layer_of, layer_prefix
from validation.bisect.promoted import TYPED

Array = NDArray[Any]
SMALL = 8
"""Elements of a constant that is part of a node's spelling."""
MOST_AXES = 5
LARGEST = 1 << 22
"""Elements of a value that is looked for in other layouts."""
TOLERANCE = 2.0**-12
SAMPLE = 64


def region(bad: ir.Value, known: Collection[ir.Value]) -> list[ir.Node]:
    """The nodes that compute a value, up to the values that are known, in the order of the graph."""
    reached: set[ir.Node] = set()
    stack = [bad]
    while stack:
        node = stack.pop().producer()
        if node is None or node in reached:
            continue
        reached.add(node)
        stack += [value for value in node.inputs if value is not None and value not in known]
    graph = bad.producer()
    assert graph is not None
    assert graph.graph is not None
    return [node for node in graph.graph if node in reached]


def departures(nodes: list[ir.Node], computed: Mapping[str, Array], trusted: Iterable[Array]) -> list[ir.Node]:
    """The nodes that the wrong value reaches back to through values that are not known, in the order of the graph: the first parts from the model."""
    candidates, inside = [(array, _length(array)) for array in trusted], set(nodes)
    reached, stack = {nodes[-1]}, [nodes[-1]]
    while stack:
        for value in stack.pop().inputs:
            node = value.producer() if value is not None else None
            if value is None or node is None or node not in inside or node in reached or _constant(node):
                continue
            array = computed.get(str(value.name))
            if array is not None and not _is_known(array, candidates):
                reached.add(node)
                stack.append(node)
    return [node for node in nodes if node in reached]


def unlike_others(node: ir.Node, layer: int, model: ir.Model) -> str | None:
    """What a node of a layer has that those of most other layers have not; None where it is like them, or there is no majority."""
    name = str(node.name).replace(layer_prefix(layer), "", 1)
    others: Counter[tuple[str, ...] | None] = Counter()
    spelled: dict[int, tuple[str, ...]] = {}
    layers = set()
    for other in model.graph:
        index = layer_of(other.metadata_props.get(MODULE_KEY))
        if index is not None:
            layers.add(index)
            if str(other.name).replace(layer_prefix(index), "", 1) == name:
                spelled[index] = _spelling(other, index)
    mine = spelled.get(layer, _spelling(node, layer))  # as in the graph: in a cut in float32 no activation is rounded
    layers.discard(layer)
    others.update(spelled.get(index) for index in layers)
    if not others:
        return None
    usual, count = others.most_common(1)[0]
    if usual == mine or 2 * count <= len(layers):
        return None
    if usual is None:
        return f"{count} of {len(layers)} other layers have no such node"
    return "; ".join(
        f"{ours} where {count} of {len(layers)} other layers have {theirs}" for ours, theirs in zip(mine, usual, strict=False) if ours != theirs
    )


def _spelling(node: ir.Node, layer: int) -> tuple[str, ...]:
    """Operator, attributes and inputs, as they read without the layer's number; dtypes are left out, as one of the two may be promoted."""
    plain = {name: attribute for name, attribute in node.attributes.items() if name not in TYPED and attribute.type != ir.AttributeType.TENSOR}
    attributes = [f"{name}={attribute.value!r}" for name, attribute in sorted(plain.items())]
    return (node.op_type, *attributes, *(_operand(value, layer) for value in node.inputs))


def _operand(value: ir.Value | None, layer: int) -> str:
    if value is None:
        return "no input"
    tensor = value.const_value
    if value.is_initializer() and tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.size <= SMALL:
        return f"constant {tensor.numpy().tolist()}"
    name, prefix = str(value.name), f"{layer_prefix(layer)}."
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    if name.startswith(("model.layers.", "model.embed_tokens")):
        return "the hidden state"
    return "an input" if name.startswith(("past_key_values", "constant_")) else name


def _constant(node: ir.Node) -> bool:
    """Whether a node is computed from constants alone: weights are held against the checkpoint elsewhere."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if value is not None and not value.is_initializer() and (producer is None or not _constant(producer)):
            return False
    return True


def _is_known(array: Array, candidates: Iterable[tuple[Array, float]]) -> bool:
    """Whether an array is one of some arrays, each with its length, in any layout; arrays of other lengths need not be turned to see it."""
    length = _length(array)
    return any(abs(length - other) <= TOLERANCE * other and _same_numbers(array, candidate) for candidate, other in candidates)


def _length(array: Array) -> float:
    """Of all its numbers as one vector."""
    return float(np.linalg.norm(array.astype(np.float64)))


def _same_numbers(array: Array, other: Array) -> bool:
    """Whether two arrays hold the same numbers, their axes in any order."""
    if array.size != other.size or (array.dtype.kind == "f") != (other.dtype.kind == "f"):
        return False
    axes = [axis for axis, size in enumerate(other.shape) if size > 1]
    orders = permutations(range(len(axes))) if len(axes) <= MOST_AXES and array.size <= LARGEST else iter([tuple(range(len(axes)))])
    core, flat = other.reshape([other.shape[axis] for axis in axes]), array.reshape(-1)
    return any(_close(flat, np.transpose(core, order)) for order in orders)


def _close(ours: Array, turned: Array) -> bool:
    """Whether a flat array holds the numbers of another in its order; the first are looked at before all are copied."""
    first, theirs = ours[:SAMPLE].astype(np.float64), turned.flat[:SAMPLE].astype(np.float64)
    if ours.dtype.kind != "f":
        return bool(np.array_equal(first, theirs) and np.array_equal(ours, turned.reshape(-1)))
    if np.linalg.norm(first - theirs) > 0.01 * max(float(np.linalg.norm(theirs)), 1e-30):
        return False
    exact = turned.reshape(-1).astype(np.float64)
    return bool(np.linalg.norm(ours - exact) <= TOLERANCE * max(float(np.linalg.norm(exact)), 1e-30))
