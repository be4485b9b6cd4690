"""Write ``Attention`` in primitive operators, in the form that TensorRT's compiler makes one kernel of.

Before:  Attention(query [B, H, S, D], key, value [B, K, T, D], mask bool [B, 1, S, T]?, scale=1.0)
After:   MatMul(query, Transpose(keys)) ─ Where(mask, ·, finfo.min)? ─ Cast(float32)? ─ Softmax ─ Cast(back)? ─ MatMul(values)
         keys, values = key, value; grouped ones (K < H): Unsqueeze(2) ─ Expand [1, 1, H/K, 1, 1] ─ Reshape [0, H, -1, D]

Grouped heads are repeated: an older release has no operator that reads them as they are.
Source:  https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.fusions._reading import Tape
from graphs.fusions._values import Shape, numbers, producer, sizes
from graphs.fusions.attention import SMALLEST
from graphs.lowering._parts import axis_size, check_plain, refuse

OPERATOR = "Attention"
FLOAT = ir.DataType.FLOAT


def lower(graph: ir.Graph, node: ir.Node) -> None:
    """Replace one node.

    Raises:
        FusionError: a form that our rules do not make: another scale, a past, a mask that is added, lengths, unknown numbers of heads.
    """
    check_plain(node, scale=1.0, is_causal=0, qk_matmul_output_mode=0, softcap=0.0)
    if "scale" not in node.attributes:
        raise refuse(node, "its scale is not 1, but the default")
    query, key, value, mask = (*node.inputs, None)[:4]
    n_heads, n_kv_heads, head_dim = (axis_size(node.outputs[0], 1), axis_size(key, 1), axis_size(key, 3))
    if any(one is not None for one in node.inputs[4:]) or len(node.outputs) != 1:
        raise refuse(node, "it has a past, lengths or a second output")
    if query is None or key is None or value is None or not isinstance(n_heads, int) or not isinstance(n_kv_heads, int):
        raise refuse(node, "the numbers of heads are not known")
    dtype = query.dtype or key.dtype
    if dtype not in SMALLEST or (mask is not None and mask.dtype not in (None, ir.DataType.BOOL)):
        raise refuse(node, f"it is {dtype}, its mask {mask.dtype if mask is not None else None}")
    tape = Tape(graph, node.outputs[0])
    groups = (n_heads, n_heads // n_kv_heads, head_dim)
    keys, values = (_repeated(tape, _source(part), groups) for part in (key, value))
    weights = _weights(tape, query, keys, mask, dtype, n_heads)
    tape.add("MatMul", weights, values, dtype=dtype, shape=sizes(node.outputs[0]))
    tape.finish()


def _weights(tape: Tape, query: ir.Value, keys: ir.Value, mask: ir.Value | None, dtype: ir.DataType, n_heads: int) -> ir.Value:
    """Soft-max of the masked scores [B, H, S, T]."""
    batch, _, total, head_dim = sizes(keys) or (None,) * 4
    shape: Shape = (batch, n_heads, axis_size(query, 2), total)
    turned = tape.add("Transpose", keys, dtype=dtype, shape=(batch, n_heads, head_dim, total), perm=(0, 1, 3, 2))
    scores = tape.add("MatMul", query, turned, dtype=dtype, shape=shape)
    if mask is not None:
        scores = tape.add("Where", mask, scores, tape.constant(SMALLEST[dtype], dtype), dtype=dtype, shape=shape)
    if dtype == FLOAT:
        return tape.add("Softmax", scores, dtype=dtype, shape=shape, axis=-1)
    scores32 = tape.add("Cast", scores, dtype=FLOAT, shape=shape, to=int(FLOAT))
    weights = tape.add("Softmax", scores32, dtype=FLOAT, shape=shape, axis=-1)
    return tape.add("Cast", weights, dtype=dtype, shape=shape, to=int(dtype))


def _source(part: ir.Value) -> ir.Value:
    """Keys or values before the Reshape that changes nothing (graphs/fusions/attention.py)."""
    reshape = producer(part, "Reshape")
    source = reshape.inputs[0] if reshape is not None and numbers(reshape.inputs[1]) == (0, 0, 0, 0) else None
    return part if source is None else source


def _repeated(tape: Tape, part: ir.Value, groups: tuple[int, int, int | str | None]) -> ir.Value:
    """Each of K heads H/K times, one behind the other: [B, H, T, D]."""
    n_heads, group, head_dim = groups
    if group == 1:
        return part
    batch, n_kv_heads, total, _ = sizes(part) or (None,) * 4
    apart = tape.add("Unsqueeze", part, [2], like=part, shape=(batch, n_kv_heads, 1, total, head_dim))
    expanded = tape.add("Expand", apart, [1, 1, group, 1, 1], like=part, shape=(batch, n_kv_heads, group, total, head_dim))
    last = head_dim if isinstance(head_dim, int) else -1
    return tape.add("Reshape", expanded, [0, n_heads, -1, last], like=part, shape=(batch, n_heads, total, head_dim))
