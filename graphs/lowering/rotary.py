"""Write ``RotaryEmbedding`` in primitive operators: the same tables, read by the same positions.

Before:  x [B, H, S, D] ─ RotaryEmbedding(cos, sin, position_ids?)
After:   x ─ Split → x1, x2;  Concat(x1·cos − x2·sin, x2·cos + x1·sin);  cos, sin = Unsqueeze(Gather(table, position_ids)?) [B, 1, S, D/2]

What is read from the tables is the same in every layer, and is computed once.
Source:  https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html
"""

from __future__ import annotations

import onnx_ir as ir

from artifact.layout import MODULE_KEY
from graphs.fusions._reading import Tape
from graphs.fusions._values import numbers, rank, sizes
from graphs.lowering._parts import axis_size, check_plain, made_of, put_before, refuse

OPERATOR = "RotaryEmbedding"
HEADS_AXIS = 1
MODULE = "model.rotary_emb"
"""Where our exporter computes what all layers share of it."""


def lower(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node.

    Raises:
        FusionError: interleaved pairs, a part of the head, or heads that are not an axis of their own.
    """
    check_plain(node, interleaved=0, rotary_embedding_dim=0, num_heads=node.attributes.get_int("num_heads", 0))  # heads are an axis here
    x, cos, sin = node.inputs[:3]
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    head_dim = axis_size(x, 3)
    if x is None or not isinstance(head_dim, int):
        raise refuse(node, "the input is not [B, H, S, D] with a known D")
    shape = sizes(x) or ()
    half, tape = (*shape[:3], head_dim // 2), Tape(graph, node.outputs[0])
    factors = [_factor(graph, node, table, positions) for table in (cos, sin)]
    first, second = tape.add_all("Split", x, [head_dim // 2] * 2, outputs=2, dtype=x.dtype, shape=half, axis=-1)

    def product(part: ir.Value, factor: ir.Value) -> ir.Value:
        return tape.add("Mul", part, factor, dtype=x.dtype, shape=half)

    turned_first = tape.add("Sub", product(first, factors[0]), product(second, factors[1]), dtype=x.dtype, shape=half)
    turned_second = tape.add("Add", product(second, factors[0]), product(first, factors[1]), dtype=x.dtype, shape=half)
    tape.add("Concat", turned_first, turned_second, dtype=x.dtype, shape=shape, axis=-1)
    tape.finish()


def _factor(graph: ir.Graph, node: ir.Node, table: ir.Value | None, positions: ir.Value | None) -> ir.Value:
    """Cosine or sine [B, 1, S, D/2]; the one that an earlier layer has made, if there is one."""
    if table is None or rank(table) not in (2, 3, None):
        raise refuse(node, "its tables are not [positions, D/2] or [B, S, D/2]")
    module = MODULE if MODULE_KEY in node.metadata_props else ""
    read = table if positions is None else made_of(table, "Gather", lambda gather: gather.inputs[1] is positions and _axis(gather) == 0)
    if read is None:
        assert positions is not None
        shape = (*(sizes(positions) or ()), (sizes(table) or (None,))[-1])
        read = put_before(graph, node, ir.node("Gather", [table, positions], {"axis": 0}), shape, module)
    made = made_of(read, "Unsqueeze", lambda unsqueeze: numbers(unsqueeze.inputs[1]) == (HEADS_AXIS,))
    if made is None:
        axis = ir.Value(name=f"{read.name}.heads_axis", const_value=ir.tensor([HEADS_AXIS], dtype=ir.DataType.INT64, name=f"{read.name}.heads_axis"))
        axis.shape, axis.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(axis)
        known = sizes(read)
        made = put_before(graph, node, ir.node("Unsqueeze", [read, axis]), None if known is None else (known[0], 1, *known[1:]), module)
    return made


def _axis(gather: ir.Node) -> int | None:
    return gather.attributes.get_int("axis", 0)
