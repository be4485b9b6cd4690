"""Write ``Attention`` in primitive operators, in the form that TensorRT's compiler makes one kernel of.

Before:  Attention(query [B, H, S, D], key, value [B, K, T, D], mask bool [B, 1, S, T]?, scale=1.0)
After:   MatMul(query, Transpose(key)) ─ Where(mask, ·, finfo.min)? ─ Cast(float32)? ─ Softmax ─ Cast(back)? ─ MatMul(value)
         grouped (K < H): query ─ Reshape [0, K, -1, 0] [B, K, H/K·S, D];  mask ─ Concat of itself, H/K times, on its rows;  · ─ Reshape [0, H, -1, 0]

An older release has no operator that lets query heads share a key head. So the queries of a group are stacked as rows of their one key head, and no
key or value is repeated. The stacked mask is the same for all layers. Of all plain forms it alone is fused without repeating (docs/adr/010).
Source:  https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.fusions._reading import Tape
from graphs.fusions._values import Shape, Size, module_of, sizes, unreshaped
from graphs.fusions.attention import SMALLEST
from graphs.lowering._parts import axis_size, check_plain, made_of, put_before, refuse

OPERATOR = "Attention"
FLOAT = ir.DataType.FLOAT
HEADS_AXIS, ROWS_AXIS = 1, 2


def lower(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node.

    Raises:
        FusionError: a form that our rules do not make: another scale, a past, a mask that is added, lengths, unknown numbers of heads.
    """
    check_plain(node, scale=1.0, is_causal=0, qk_matmul_output_mode=0, softcap=0.0)
    if "scale" not in node.attributes:
        raise refuse(node, "its scale is not 1, but the default")
    query, key, value, mask = (*node.inputs, None)[:4]
    n_heads, n_kv_heads = axis_size(node.outputs[0], HEADS_AXIS), axis_size(key, HEADS_AXIS)
    if any(one is not None for one in node.inputs[4:]) or len(node.outputs) != 1:
        raise refuse(node, "it has a past, lengths or a second output")
    if query is None or key is None or value is None or not isinstance(n_heads, int) or not isinstance(n_kv_heads, int):
        raise refuse(node, "the numbers of heads are not known")
    dtype = query.dtype or key.dtype
    if dtype not in SMALLEST or (mask is not None and mask.dtype not in (None, ir.DataType.BOOL)):
        raise refuse(node, f"it is {dtype}, its mask {mask.dtype if mask is not None else None}")
    group = n_heads // n_kv_heads
    if group > 1:
        mask = _stacked_mask(graph, node, mask, group)
    tape, shape = Tape(graph, node.outputs[0]), sizes(query) or (None,) * 4
    rows: Shape = (shape[0], n_kv_heads, _times(group, shape[2]), shape[3])
    if group > 1:
        query = tape.add("Reshape", query, [0, n_kv_heads, -1, 0], dtype=dtype, shape=rows)
    weights = _weights(tape, query, unreshaped(key), mask, dtype, rows)
    attended = tape.add("MatMul", weights, unreshaped(value), dtype=dtype, shape=rows)
    if group > 1:
        tape.add("Reshape", attended, [0, n_heads, -1, 0], dtype=dtype, shape=sizes(node.outputs[0]))
    tape.finish()


def _weights(tape: Tape, query: ir.Value, keys: ir.Value | None, mask: ir.Value | None, dtype: ir.DataType, rows: Shape) -> ir.Value:
    """Soft-max of the masked scores [B, K, H/K·S, T] of queries [B, K, H/K·S, D]."""
    batch, n_heads, n_rows, head_dim = rows
    total = axis_size(keys, 2)
    shape = (batch, n_heads, n_rows, total)
    turned = tape.add("Transpose", keys, dtype=dtype, shape=(batch, n_heads, head_dim, total), perm=(0, 1, 3, 2))
    scores = tape.add("MatMul", query, turned, dtype=dtype, shape=shape)
    if mask is not None:
        scores = tape.add("Where", mask, scores, tape.constant(SMALLEST[dtype], dtype), dtype=dtype, shape=shape)
    if dtype == FLOAT:
        return tape.add("Softmax", scores, dtype=dtype, shape=shape, axis=-1)
    scores32 = tape.add("Cast", scores, dtype=FLOAT, shape=shape, to=int(FLOAT))
    weights = tape.add("Softmax", scores32, dtype=FLOAT, shape=shape, axis=-1)
    return tape.add("Cast", weights, dtype=dtype, shape=shape, to=int(dtype))


def _stacked_mask(graph: ir.Graph, node: ir.Node, mask: ir.Value | None, group: int) -> ir.Value | None:
    """A mask [B, 1, S, T] for each query of a group: [B, 1, H/K·S, T]; the one that an earlier layer has made, if there is one."""
    if mask is None:
        return None
    shape, new = sizes(mask), axis_size(node.inputs[0], ROWS_AXIS)
    if shape is None or len(shape) != 4 or shape[HEADS_AXIS] != 1 or shape[ROWS_AXIS] != new or new is None:
        raise refuse(node, f"its heads are grouped, and its mask is {shape}, not [B, 1, {new}, T]")
    same = [mask] * group
    made = made_of(mask, "Concat", lambda concat: list(concat.inputs) == same)
    if made is not None:
        return made
    stacked = (*shape[:ROWS_AXIS], _times(group, new), *shape[ROWS_AXIS + 1 :])
    return put_before(graph, node, ir.node("Concat", same, {"axis": ROWS_AXIS}), stacked, module_of(mask))


def _times(count: int, size: Size) -> Size:
    """Size of an axis that holds another one several times."""
    if size is None or count == 1:
        return size
    return count * size if isinstance(size, int) else f"{count}*{size}"
