"""Pack the query, key and value projections into one linear.

Before:  x ─ MatMul(Transpose(w [n·D, E])) ─ Reshape [0, 0, n, D] ─ Transpose(0, 2, 1, 3) ─ heads [B, n, S, D]      three times, n = H, K, K
After:   x ─ MatMul(Transpose(qkv [(H+2K)·D, E])) ─ Reshape [0, 0, H+2K, D] ─ Split(axis=2, [H, 2K]) → query, cache
         query ─ Transpose(0, 2, 1, 3);  cache ─ Transpose(0, 2, 1, 3) ─ Split(axis=1, [K, K])
         With biases [n·D] each MatMul is followed by an Add before, and the packed one by an Add of [(H+2K)·D] after.

The query parts before the transposition, because TensorRT makes one kernel of all that stands behind it. Query and cache differ in size, and a kernel
that writes different sizes is stored for every layer (docs/adr/007); keys and values have one size, and are still written by one kernel.
Source:  graphs/fusions/_packing.py, why the split is on the axis of the heads
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchingTracer, MatchResult, RewriteRule, RewriteRuleSet, SimplePatternMatcher

from graphs.fusions._packing import TURNED, packed_linear, packing_objections
from graphs.fusions._rule import FusionRule, Objection
from graphs.fusions._values import in_module, module_of, numbers, only_user, producer, shape_constant, sizes

PACKED_NAME = "self_attn.qkv_proj"
UNTURNED_AXIS, HEADS_AXIS, HEADS_FIRST = 2, 1, (0, 2, 1, 3)
PARTS = ("query", "key", "value")


class PackQKV(FusionRule):
    """Rules: 1. the three weights lie next to each other: q, k, v, and so do biases; 2. all heads have one head_dim."""

    @classmethod
    def rule(cls, *args: Any, **kwargs: Any) -> RewriteRule:
        """The rule, matched by ``SiblingMatcher``."""
        instance = cls(*args, **kwargs)
        return RewriteRule(instance.pattern, instance.rewrite, instance.check, SiblingMatcher, name=instance.name)

    def pattern(  # noqa: PLR0917  # the library reads the variables' names from the signature
        self, op: Any, x: Any, query_weight: Any, key_weight: Any, value_weight: Any, query_shape: Any, key_shape: Any, value_shape: Any
    ) -> Any:
        """Three outputs; the first is the one whose weight is stored first."""

        def heads(weight: Any, shape: Any, name: str) -> Any:
            linear = op.MatMul(x, op.Transpose(weight, perm=TURNED))
            return op.Transpose(op.Reshape(linear, shape), perm=HEADS_FIRST, _outputs=[name])

        return heads(query_weight, query_shape, "query"), heads(key_weight, key_shape, "key"), heads(value_weight, value_shape, "value")

    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """Weights that are not one, and heads of different sizes."""
        yield from packing_objections(matched["x"], _of_parts(matched, "weight"), PACKED_NAME, _of_parts(matched, "bias"))
        for shape in _of_parts(matched, "shape"):
            sizes_wanted = numbers(shape)
            if sizes_wanted is None or len(sizes_wanted) != 4 or sizes_wanted[:2] != (0, 0):
                yield "the reshape to heads is not [0, 0, heads, head_dim]", shape
        head_dims = [_head_sizes(shape)[-1] for shape in _of_parts(matched, "shape")]
        if len(set(head_dims)) != 1:
            yield f"query, key and value have different head_dim: {head_dims}", matched["query"]

    def rewrite(self, op: Any, **matched: ir.Value) -> Any:
        """The packed linear, reshaped to heads and split between them."""
        x, query, weights = matched["x"], matched["query"], _of_parts(matched, "weight")
        module, dtype, shape = module_of(query), x.dtype, sizes(x)
        assert shape is not None
        n_heads = [_head_sizes(shape)[2] for shape in _of_parts(matched, "shape")]
        n_all, head_dim = sum(n_heads), _head_sizes(matched["query_shape"])[3]
        linear = packed_linear(op, x, weights, PACKED_NAME, _of_parts(matched, "bias"))  # [B, S, (H+2K)·D]
        target = shape_constant(op, f"{query.name}.heads", [0, 0, n_all, head_dim])
        heads = in_module(op.Reshape(linear, target), module, dtype, (*shape[:2], n_all, head_dim))
        return [in_module(part, module) for part in _parted(op, heads, query.name, n_heads)]


def _head_sizes(shape: ir.Value) -> tuple[int, ...]:
    """[0, 0, heads, head_dim] of a reshape whose shape is known to be constant."""
    found = numbers(shape)
    assert found is not None
    return tuple(int(size) for size in found)


def _parted(op: Any, heads: ir.Value, name: str | None, n_heads: list[int]) -> list[ir.Value]:
    """Query, key and value [B, n, S, D] from all heads [B, S, H+2K, D]."""
    module, dtype, shape = module_of(heads), heads.dtype, sizes(heads)
    assert shape is not None
    batch, new, _, head_dim = shape
    n_rest = sum(n_heads[1:])
    query, rest = op.Split(heads, shape_constant(op, f"{name}.query_parts", [n_heads[0], n_rest]), axis=UNTURNED_AXIS, _outputs=2)
    for part, n_part in ((query, n_heads[0]), (rest, n_rest)):
        in_module(part, module, dtype, (batch, new, n_part, head_dim))
    turned_query, turned = op.Transpose(query, perm=HEADS_FIRST), op.Transpose(rest, perm=HEADS_FIRST)
    in_module(turned, module, dtype, (batch, n_rest, new, head_dim))
    return [turned_query, *op.Split(turned, shape_constant(op, f"{name}.cache_parts", n_heads[1:]), axis=HEADS_AXIS, _outputs=2)]


class PackBiasedQKV(PackQKV):
    """The same with a bias on all three."""

    def pattern(  # type: ignore[override]  # noqa: PLR0913, PLR0917
        self,
        op: Any,
        x: Any,
        query_weight: Any,
        key_weight: Any,
        value_weight: Any,
        query_bias: Any,
        key_bias: Any,
        value_bias: Any,
        query_shape: Any,
        key_shape: Any,
        value_shape: Any,
    ) -> Any:
        """Three outputs, as without."""

        def heads(weight: Any, bias: Any, shape: Any, name: str) -> Any:
            linear = op.Add(op.MatMul(x, op.Transpose(weight, perm=TURNED)), bias)
            return op.Transpose(op.Reshape(linear, shape), perm=HEADS_FIRST, _outputs=[name])

        query = heads(query_weight, query_bias, query_shape, "query")
        return query, heads(key_weight, key_bias, key_shape, "key"), heads(value_weight, value_bias, value_shape, "value")


class SiblingMatcher(SimplePatternMatcher):
    """Try the linears that share an input, in stored order, as the outputs of a pattern.

    The library's own search for patterns of several outputs tries every tuple of nodes in the graph: cubic in depth here.
    """

    def match(
        self,
        model: ir.Model,
        graph_or_function: ir.Graph | ir.Function,
        node: ir.Node,
        *,
        verbose: int = 0,
        remove_nodes: bool = True,
        tracer: MatchingTracer | None = None,
    ) -> MatchResult:
        """Match the siblings of ``node`` if it is the first of them."""
        self._graph = graph_or_function if isinstance(graph_or_function, ir.Graph) else graph_or_function.graph
        self._init_match(verbose)
        siblings = [heads for _, heads in sibling_heads(node)]
        if not siblings or siblings[0] is not node:
            return self._match.fail("not the first of several linears that are reshaped to heads", node)
        if len(siblings) != len(PARTS):
            self._match.add_node(node)
            return self._match.fail(f"{len(siblings)} linears reshaped to heads read this input; expected {', '.join(PARTS)}", node)
        return self._multi_match(siblings, check_removable=remove_nodes)


def sibling_heads(node: ir.Node) -> list[tuple[ir.Value, ir.Node]]:
    """Linears that are reshaped to heads and read the same input as the one that ends at ``node``.

    In stored order where they are stored in one file, otherwise in the graph's.

    Returns:
        (weight, the Transpose that yields the heads) of each; empty if ``node`` is no such Transpose.
    """
    reshape = producer(node.inputs[0], "Reshape") if node.op_type == "Transpose" else None
    output = reshape.inputs[0] if reshape is not None else None
    biased = producer(output, "Add")
    linear = producer(biased.inputs[0] if biased is not None else output, "MatMul")
    if linear is None:
        return []
    read, found = linear.inputs[0], []
    assert read is not None
    for user in (use.node for use in read.uses() if use.node.op_type == "MatMul"):
        weight, heads = _weight(user), _heads(user)
        if weight is not None and heads is not None:
            found.append((weight, heads))
    in_one_file = len({_stored_at(weight)[0] for weight, _ in found}) == 1
    return sorted(found, key=lambda pair: _stored_at(pair[0])) if in_one_file else found


def _weight(linear: ir.Node) -> ir.Value | None:
    turned = producer(linear.inputs[1], "Transpose")
    weight = turned.inputs[0] if turned is not None else None
    return weight if weight is not None and weight.is_initializer() else None


def _heads(linear: ir.Node) -> ir.Node | None:
    biased = only_user(linear.outputs[0], "Add")
    reshape = only_user((linear if biased is None else biased).outputs[0], "Reshape")
    heads = only_user(reshape.outputs[0], "Transpose") if reshape is not None else None
    return heads if heads is not None and tuple(heads.attributes.get_ints("perm", ())) == HEADS_FIRST else None


def _stored_at(weight: ir.Value) -> tuple[str, int]:
    tensor = weight.const_value
    return (str(tensor.location), tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else ("", 0)


def _of_parts(matched: dict[str, ir.Value], kind: str) -> list[ir.Value]:
    """The three weights, biases or shapes; none where the linears have none."""
    return [matched[f"{part}_{kind}"] for part in PARTS if f"{part}_{kind}" in matched]


def is_candidate(node: ir.Node) -> bool:
    """The first of several linears that are reshaped to heads and read one input."""
    siblings = [heads for _, heads in sibling_heads(node)]
    return len(siblings) > 1 and siblings[0] is node


RULES = RewriteRuleSet([PackQKV.rule(), PackBiasedQKV.rule()])
