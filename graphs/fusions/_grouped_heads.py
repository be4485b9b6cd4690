"""What ONNX Runtime's ``GroupQueryAttention`` knows by itself around an attention: the cache, and heads that lie in linears [B, S, n·D]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._contrib import CONTRIB, Recorder, place
from graphs.fusions._packing import Projections, read_projections
from graphs.fusions._reading import Refused, first, need, scaled, shape_of
from graphs.fusions._values import Shape, in_module, last_size, module_of, numbers, only_user, producer, rank, sizes, unreshaped
from graphs.fusions.pack_qkv import PACKED_NAME

HEADS_FIRST, LINEAR_RANK = (0, 2, 1, 3), 3
TIME_AXIS = 2
SIZE_STEP = 8
"""Head sizes that the operator takes, where it does not rotate, are multiples of this."""
MASK, PLAIN = 3, {"scale": 1.0}
"""Input of Attention, and its attributes."""
NO_TABLES = (None, None, None)
"""In the places of cosine, sine and positions."""
NOT_JOINED = "its result is not turned and reshaped to [B, S, H · D]"


@dataclass(frozen=True)
class Heads:
    """Heads [B, n, S, D] of a linear's output [B, S, n·D]; ``rotation`` is the RotaryEmbedding between, or None."""

    linear: ir.Value
    count: int
    rotation: ir.Node | None

    def rotated(self, op: Recorder, module: str) -> ir.Value:
        """The same rotation, of [B, S, n·D]."""
        assert self.rotation is not None
        pairs = self.rotation.attributes.get_int("interleaved", 0)
        rotated = op.RotaryEmbedding(self.linear, *self.rotation.inputs[1:], interleaved=pairs, num_heads=self.count)
        return in_module(rotated, module, self.linear.dtype, sizes(self.linear))


@dataclass(frozen=True)
class Cached:
    """New keys or values, and the cache before and behind them."""

    heads: Heads
    past: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class Grouped:
    """One attention with its cache; ``joined`` is its result [B, S, H·D]."""

    query: Heads
    key: Cached
    value: Cached
    scale: float
    joined: ir.Value

    def replace(self, graph: ir.Graph, op: Recorder, operands: Sequence[ir.Value | None], *, do_rotary: int) -> None:
        """Put one node in the place of the cache, the layout and the attention."""
        last = self.joined.producer()
        assert last is not None
        attended, *present = op.GroupQueryAttention(
            *operands,
            num_heads=self.query.count,
            kv_num_heads=self.key.heads.count,
            scale=self.scale,
            do_rotary=do_rotary,
            _domain=CONTRIB,
            _outputs=3,
        )
        in_module(attended, module_of(self.joined))
        place(graph, last, op, list(zip((self.joined, self.key.present, self.value.present), (attended, *present), strict=True)))

    def replace_masked(self, graph: ir.Graph, op: Recorder, bias: ir.Value, seqlens: ir.Value, total: ir.Value) -> None:
        """The same, rotated in front of the node and masked by a bias [B, 1, S, T]; its lengths are those of the mask's columns."""
        module = module_of(self.joined)
        query, key = (heads.rotated(op, module) for heads in (self.query, self.key.heads))
        self.replace(graph, op, (query, key, self.value.heads.linear, self.key.past, self.value.past, seqlens, total, *NO_TABLES, bias), do_rotary=0)


def is_attention(node: ir.Node) -> bool:
    """Every Attention of the standard domain."""
    return node.op_type == "Attention" and node.domain == ""


def read_mask_input(attention: ir.Node) -> ir.Value:
    """The mask of an Attention that has no other attributes than scale = 1; raises Refused."""
    mask = attention.inputs[MASK] if len(attention.inputs) > MASK else None
    if mask is None or {name: attribute.value for name, attribute in attention.attributes.items()} != PLAIN:
        raise Refused("it has no mask, or other attributes than scale = 1")
    return mask


def read_grouped(attention: ir.Node, read_cache: Callable[[str, ir.Value | None], Cached], size_step: int) -> Grouped:
    """What an Attention computes of which linears; ``read_cache`` reads its keys and its values. Raises Refused.

    The operator takes heads of ``size_step`` elements, or a multiple: ONNX Runtime stops at a graph of others when it runs.
    """
    unscaled, scale = scaled(first(attention))
    query, key, value = read_heads("query", unscaled), read_cache("key", attention.inputs[1]), read_cache("value", attention.inputs[2])
    if query.rotation is None or key.heads.rotation is None or value.heads.rotation is not None:
        raise Refused("query and key are rotated, values are not: here it is otherwise")
    if query.rotation.inputs[1:] != key.heads.rotation.inputs[1:]:
        raise Refused("query and key are rotated by different tables or positions")
    if key.heads.count != value.heads.count or query.count % key.heads.count:
        raise Refused(f"{query.count} query heads can't share {key.heads.count} key heads and {value.heads.count} value heads")
    width = last_size(query.linear)
    if not isinstance(width, int) or width % (query.count * size_step):
        raise Refused(f"{query.count} heads in {width} columns are not of a multiple of {size_step} elements, as the operator needs")
    widths = [last_size(one.heads.linear) for one in (key, value)]
    if widths != [width // query.count * key.heads.count] * 2:
        raise Refused(f"heads of unlike sizes: {query.count} query heads in {width} columns, {key.heads.count} others in {widths[0]} and {widths[1]}")
    return Grouped(query, key, value, scale, read_joined(attention.outputs[0]))


def read_heads(name: str, value: ir.Value) -> Heads:
    """The linear, its heads and their rotation behind a value [B, n, S, D]; raises Refused."""
    rotation = producer(value, "RotaryEmbedding")
    if rotation is not None and rotation.attributes.get_int("rotary_embedding_dim", 0) != 0:
        raise Refused(f"the {name} is rotated in part")
    otherwise = f"the {name} is not a linear's output [B, S, heads · D] that is reshaped and turned to [B, heads, S, D]"
    turned = need(value if rotation is None else rotation.inputs[0], "Transpose", otherwise=otherwise)
    reshape = need(turned.inputs[0], "Reshape", otherwise=otherwise)
    linear = first(reshape)
    if turned.attributes.get_ints("perm") != HEADS_FIRST or rank(linear) != LINEAR_RANK:
        raise Refused(otherwise)
    match kept_axes(reshape):
        case (int(count), _) if count > 0:
            return Heads(linear, count, rotation)
    raise Refused(f"the {name} is reshaped to {numbers(reshape.inputs[1])}, not to [0, 0, heads, D]")


def kept_axes(reshape: ir.Node) -> Shape:
    """What a Reshape makes of the axes behind [B, S], by its shape or by what was measured; () where these two do not stay as they are."""
    match numbers(reshape.inputs[1]):
        case (0, 0, *behind):
            return tuple(map(int, behind))
    before, after = shape_of(first(reshape)), shape_of(reshape.outputs[0])
    return after[2:] if before[:2] == after[:2] and None not in after[:2] else ()


def read_concatenated(name: str, value: ir.Value | None) -> Cached:
    """Keys or values [B, K, T, D] that are the past's and the new ones behind them; raises Refused."""
    otherwise = f"the {name} is not the past and the new ones behind it, joined on axis {TIME_AXIS}"
    concat = need(unreshaped(value), "Concat", otherwise=otherwise)
    if len(concat.inputs) != 2 or concat.attributes.get_int("axis") not in (TIME_AXIS, TIME_AXIS - len(HEADS_FIRST)):
        raise Refused(otherwise)
    past, new = concat.inputs
    assert past is not None
    assert new is not None
    return Cached(read_heads(name, new), past, concat.outputs[0])


def read_joined(attended: ir.Value) -> ir.Value:
    """The [B, S, H·D] that an attention's [B, H, S, D] is turned and reshaped to; raises Refused."""
    turned = _only_user(attended, "Transpose")
    reshape = _only_user(turned.outputs[0], "Reshape")
    if turned.attributes.get_ints("perm") != HEADS_FIRST or len(kept_axes(reshape)) != 1:
        raise Refused(NOT_JOINED)
    return reshape.outputs[0]


def _only_user(value: ir.Value, op_type: str) -> ir.Node:
    node = only_user(value, op_type)
    if node is None:
        readers = ", ".join(use.node.op_type for use in value.uses())
        raise Refused(f"{NOT_JOINED}, but read by {readers}")
    return node


def read_qkv(query: ir.Value | None, key: ir.Value | None, value: ir.Value | None) -> Projections:
    """The linears of query, key and value that are one packed linear; raises Refused."""
    return read_projections({"query": query, "key": key, "value": value}, PACKED_NAME)


def feed_packed(graph: ir.Graph, op: Recorder, attention: ir.Node, packed: ir.Value) -> None:
    """Let a GroupQueryAttention read query, key and value as one [B, S, (H+2K)·D], which recorded nodes compute."""
    place(graph, attention, op, [])
    for index, operand in enumerate((packed, None, None)):
        attention.replace_input_with(index, operand)


def read_tables(rotation: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Tables cos and sin [positions, D/2] and the positions [B, S] of a RotaryEmbedding; raises Refused."""
    match rotation.inputs[1:]:
        case (ir.Value() as cos, ir.Value() as sin, ir.Value() as positions) if rank(cos) == rank(sin) == 2:
            return cos, sin, positions
    raise Refused("query and key are not rotated by tables [positions, D/2] that are read by positions")
