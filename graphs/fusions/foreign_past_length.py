"""Let the past's length follow from the mask's and the new tokens', so that the past may be a buffer that is longer: one with the present.

Before:  Shape(past [B, K, P, D])
After:   Concat(Shape(past)[0], K, Shape(mask)[1] − Shape(ids)[1], D)          P = T − S, as the columns of the mask [B, T] count them

Whoever binds one buffer as past and present, so that nothing is copied in a step, gives it more rows than are filled; a graph that reads the past's
length from its shape would then mask and rotate by the buffer's. Whatever else reads a past than the attention is refused: then one buffer can't be
both. It comes last, since in a graph whose attention joins the cache by itself there is nothing to win.
Source:  docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from artifact.io_spec import PAST, SEQUENCE, TOTAL
from graphs.fusions._contrib import CONTRIB, GROUPED
from graphs.fusions._reading import Refused, Tape, first, shape_of

TIME_AXIS, N_AXES = 2, 4


@dataclass(frozen=True)
class PastShape:
    """The axes of a past [B, K, P, D] that a node reads the sizes of, and inputs [B, T] and [B, S]."""

    past: ir.Value
    axes: slice
    mask: ir.Value
    ids: ir.Value
    shape: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every node but an attention that reads a graph's input [B, K, P, D], or its length."""
    if _is_attention(node) or not any(value is not None and _is_past(value) for value in node.inputs):
        return False
    return TIME_AXIS in range(N_AXES)[_axes(node)]


def _is_past(value: ir.Value) -> bool:
    return value.is_graph_input() and shape_of(value)[TIME_AXIS:-1] == (PAST,)


def _is_attention(node: ir.Node) -> bool:
    return node.op_type == GROUPED and node.domain == CONTRIB


def _axes(node: ir.Node) -> slice:
    """The axes of its input that a node reads: of a Shape maybe some."""
    return slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", N_AXES))


def read(node: ir.Node) -> PastShape:
    """Which sizes are read, and what the length follows from; raises Refused."""
    assert node.graph is not None
    readers = (use.node for value in node.graph.inputs if _is_past(value) for use in value.uses())
    other = next((reader for reader in readers if not _is_attention(reader) and reader.op_type != "Shape"), None)
    if other is not None:
        raise Refused(f"{other.name or other.op_type} reads the past, so past and present can't be one buffer")
    past, mask, ids = first(node), _fed(node, TOTAL), _fed(node, SEQUENCE)
    if mask is None or ids is None:
        raise Refused("no mask [B, T] and token ids [B, S] are fed to count the past by, so past and present can't be one buffer")
    _, heads, _, head_dim = shape_of(past)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise Refused(f"a past of {heads} heads of {head_dim} elements: not known how many")
    return PastShape(past, _axes(node), mask, ids, node.outputs[0])


def _fed(node: ir.Node, axis: str) -> ir.Value | None:
    """The first input [B, axis] of the graph."""
    assert node.graph is not None
    return next((value for value in node.graph.inputs if shape_of(value)[1:] == (axis,)), None)


def rewrite(graph: ir.Graph, found: PastShape) -> None:
    """The same sizes, the length from the inputs."""
    tape, (_, heads, _, head_dim) = Tape(graph, found.shape), shape_of(found.past)
    batch = tape.add("Shape", found.past, end=1)
    total, new = (tape.add("Shape", value, start=1) for value in (found.mask, found.ids))
    parts = [batch, tape.constant([heads]), tape.add("Sub", total, new), tape.constant([head_dim])][found.axes]
    if len(parts) > 1:
        tape.add("Concat", *parts, axis=0)
    tape.finish()
