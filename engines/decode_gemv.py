"""Decode as a matrix by a vector, for fewer kernels a layer: q·k·v and down get a second form, which each profile keeps or drops.

Before:  x [B, S, E] ─ MatMul(Cast(Transpose(W))) ─ y [B, S, N]
After:   x ─ Split([n, S − n], axis=1) ┬ [B, n, E] ─ Unsqueeze ─ Mul(Cast(W · one)) ─ ReduceSum ┬ Concat(axis=1) ─ y
                                       └ [B, S − n, E] ─ MatMul(Cast(Transpose(W))) ────────────┘     n = 1 // S

n is 1 for one new token and 0 for more. TensorRT-RTX works it out for each profile, where decode has S = 1 and prefill begins at S = 2, and drops the
empty branch: prefill runs what it ran, and decode's sum of products is a kernel of the compiler's own making, which takes in what stands before it:
the norm's last step, SiLU · up, and the rotations behind q·k·v (10 kernels a layer → 8, docs/adr/010). Products and sums are float32, as in a GEMM.
``one`` is 1, computed from the token ids: a constant weight would be stored a second time, in float32. Weights are the same bytes. It is a reduction,
so that a kernel of its own computes it once a step: what can be fused would be computed again for each product (docs/gpu-results.md).

Each of the N sums computes the norm or SiLU · up of all E inputs again, and rows read the weight in turn. So this is for small models and few rows:
it is the usual form of those for which it was measured to be faster (``decode_form``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import INPUT_IDS
from engines.backends.flags import DECODE_GEMV
from engines.graph_weights import layers_in, node_label
from engines.one_position import constant

QKV, DOWN = "qkv_", "down_"
"""In the names of the weights; gate·up and o stay GEMMs, since another form of them saves no kernel."""
COPY_HINT = "export with --weights copy into another folder"
SUFFIX = ".gemv"
"""Behind the name of a linear, in the names of what is added for it."""
_LEAST = np.iinfo(np.int64).min


def check_gemv(precision: str, parts: int | None, *, packed: bool) -> None:
    """Refuse it where it can't be, or was not tried.

    Args:
        precision: of the engine.
        parts: plans that were asked for.
        packed: whether the artifact's weights are laid out to be packed.

    Raises:
        EngineError: not float16, several parts, or weights as somebody else stored them.
    """
    if not packed:
        raise EngineError(f"{DECODE_GEMV} needs query, key and value in one linear; --weights reference leaves them apart", hint=COPY_HINT)
    if precision != "fp16":
        reason = "nothing is fused in its graph" if precision == "fp32" else "the kernel of a sum of products does not read quantised weights"
        raise EngineError(f"{DECODE_GEMV} is for fp16 engines, not {precision}: {reason}", hint=f"build {precision} without {DECODE_GEMV}")
    if parts not in (None, 1):
        raise EngineError(f"{DECODE_GEMV} is for an engine in one plan, got --parts {parts}", hint=f"leave out --parts, or {DECODE_GEMV}")


def products_bytes(config: LlamaConfig) -> int:
    """What a step of two rows holds at once where nothing is fused, in float32: a linear's products [B, 1, N, E], and its weight in both dtypes."""
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim * config.hidden_size
    return (2 * 4 + 4 + 2) * max(qkv, config.intermediate_size * config.hidden_size)


def add_gemv(graph: ir.Graph, name: str) -> None:
    """Give q·k·v and down of every layer the second form, in place.

    Args:
        graph: an engine graph in float16, with q·k·v packed.
        name: for messages.

    Raises:
        EngineError: a layer has not one of each.
    """
    stored = {node: weight for node in graph if node.op_type == "MatMul" and (weight := _stored(node)) is not None}
    linears = {node: weight for node, weight in stored.items() if QKV in str(weight.name) or DOWN in str(weight.name)}
    layers = len(layers_in(graph))
    for kind, what in ((QKV, "query, key and value in one"), (DOWN, "down_proj as one")):
        if (found := sum(kind in str(weight.name) for weight in linears.values())) != layers:
            raise EngineError(
                f"{name}: {DECODE_GEMV} needs {what} linear by a float16 weight in each of {layers} layers, found {found}",
                hint=f"{COPY_HINT}, and fuse",
            )
    shared = _Shared(graph)
    for linear, weight in linears.items():
        _add(graph, linear, weight, shared)


class _Shared:
    """What all linears read: the sizes [n, S − n], 1 in float16, and axes."""

    def __init__(self, graph: ir.Graph) -> None:
        ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
        self.third, self.last = (constant(graph, f"gemv_{label}", number) for label, number in (("third", 2), ("last", -1)))
        length = _node("Shape", [ids], "gemv_length", start=1, end=2)
        count = _node("Div", [constant(graph, "gemv_1", 1), length.outputs[0]], "gemv_count")
        rest = _node("Sub", [length.outputs[0], count.outputs[0]], "gemv_rest")
        sizes = _node("Concat", [count.outputs[0], rest.outputs[0]], "gemv_sizes", axis=0)
        always = _node("Greater", [ids, constant(graph, "gemv_least", _LEAST)], "gemv_always")
        ones = _node("Cast", [always.outputs[0]], "gemv_ones", to=ir.DataType.FLOAT16)
        one = _node("ReduceMax", [ones.outputs[0]], "gemv_one", keepdims=0)
        graph.insert_before(graph[0], [length, count, rest, sizes, always, ones, one])
        self.sizes, self.one = sizes.outputs[0], one.outputs[0]


def _add(graph: ir.Graph, linear: ir.Node, stored: ir.Value, shared: _Shared) -> None:
    """The second form of one linear; its MatMul keeps its name and its weight."""
    x, y, label = linear.inputs[0], linear.outputs[0], node_label(linear)
    assert x is not None
    split = ir.node("Split", [x, shared.sizes], {"axis": 1}, num_outputs=2, name=f"{label}_split{SUFFIX}")
    vector, rows = split.outputs
    column = _node("Unsqueeze", [vector, shared.third], f"{label}_unsqueeze{SUFFIX}")
    weight = _node("Mul", [stored, shared.one], f"{label}_weight{SUFFIX}")
    float32 = _node("Cast", [weight.outputs[0]], f"{label}_cast{SUFFIX}", to=ir.DataType.FLOAT)
    products = _node("Mul", [column.outputs[0], float32.outputs[0]], f"{label}_mul{SUFFIX}")
    sums = _node("ReduceSum", [products.outputs[0], shared.last], f"{label}_sum{SUFFIX}", keepdims=0)
    joined = _node("Concat", [sums.outputs[0], y], f"{label}_concat{SUFFIX}", axis=1)
    joined.outputs[0].type, joined.outputs[0].shape = y.type, y.shape
    y.replace_all_uses_with(joined.outputs[0])
    joined.replace_input_with(1, y)
    y.shape = None
    linear.replace_input_with(0, rows)
    before, behind = [split, column, weight, float32, products, sums], [joined]
    for node in [*before, *behind]:
        node.metadata_props.update(linear.metadata_props)
    graph.insert_before(linear, before)
    graph.insert_after(linear, behind)


def _stored(linear: ir.Node) -> ir.Value | None:
    """The weight [N, E] in float16 that a linear multiplies by, transposed and cast; None where it is something else."""
    value = linear.inputs[1]
    for operator in ("Cast", "Transpose"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value if value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT16 else None


def _node(operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Node:
    """A node whose result bears its name."""
    node = ir.node(operator, inputs, attributes, name=name)
    node.outputs[0].name = name
    return node
