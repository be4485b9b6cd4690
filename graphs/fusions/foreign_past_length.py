"""Let the past's length follow from the mask's and the new tokens', so that the past may be a buffer that is longer: one with the present.

Before:  Shape(past [B, K, P, D])
After:   Concat(Shape(past)[0], K, Shape(mask)[-1] − Shape(ids)[-1], D)          P = T − S, as the columns of the mask [B, T] count them

Whoever binds one buffer as past and present, so that nothing is copied in a step, gives it more rows than are filled; a graph that reads the past's
length from its shape would then mask and rotate by the buffer's. A graph without a mask can't count otherwise, and stays as it is.
Source:  docs/adr/012
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from artifact.io_spec import PAST, SEQUENCE, TOTAL
from graphs.fusions._reading import Refused, Tape, first, shape_of

TIME_AXIS, N_AXES, IDS_RANK = 2, 4, 2


@dataclass(frozen=True)
class PastShape:
    """The axes of a past [B, K, P, D] that a node reads the sizes of, and inputs [B, T] and [B, S]."""

    past: ir.Value
    axes: slice
    mask: ir.Value
    ids: ir.Value
    shape: ir.Value


def is_candidate(node: ir.Node) -> bool:
    """Every Shape of a graph's input [B, K, P, D] that reads its length, where a mask and token ids are fed too."""
    if node.op_type != "Shape" or not first(node).is_graph_input() or shape_of(first(node))[TIME_AXIS:-1] != (PAST,):
        return False
    return TIME_AXIS in range(N_AXES)[_axes(node)] and None not in (_fed(node, TOTAL), _fed(node, SEQUENCE))


def _axes(node: ir.Node) -> slice:
    return slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", N_AXES))


def _fed(node: ir.Node, axis: str) -> ir.Value | None:
    """The first input [B, axis] of the graph."""
    assert node.graph is not None
    return next((value for value in node.graph.inputs if len(shape_of(value)) == IDS_RANK and shape_of(value)[1] == axis), None)


def read(node: ir.Node) -> PastShape:
    """Which sizes are read, and what the length follows from; raises Refused."""
    mask, ids, past = _fed(node, TOTAL), _fed(node, SEQUENCE), first(node)
    assert mask is not None
    assert ids is not None
    _, heads, _, head_dim = shape_of(past)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise Refused(f"a past of {heads} heads of {head_dim} elements: not known how many")
    return PastShape(past, _axes(node), mask, ids, node.outputs[0])


def rewrite(graph: ir.Graph, found: PastShape) -> None:
    """The same sizes, the length from the inputs."""
    tape, (_, heads, _, head_dim) = Tape(graph, found.shape), shape_of(found.past)
    batch = tape.add("Shape", found.past, end=1)
    total, new = (tape.add("Shape", value, start=1) for value in (found.mask, found.ids))
    parts = [batch, tape.constant([heads]), tape.add("Sub", total, new), tape.constant([head_dim])][found.axes]
    if len(parts) > 1:
        tape.add("Concat", *parts, axis=0)
    tape.finish()
