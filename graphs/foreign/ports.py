"""Which input and output of a decoder's graph is what: by name where names say it, else by rank, dtype and order.

Names that are read: ``input_ids``, ``attention_mask``, ``position_ids`` or ``cache_position``, ``logits``; of caches the layer and the kind, in the
spellings of optimum-onnx and onnxruntime-genai (``past_key_values.0.key``, ``present.0.value``), of torch.onnx.export for a DynamicCache
(``past_key_values_key_cache_0``) and for nested tuples (``past_key_values_0_1``). Where names say nothing, caches are in the order of nested tuples:
key and value of layer 0, of layer 1, …; those that leave in the order of those that enter.
Letters: B batch, S new tokens, P past, T = P + S, K kv heads, D head_dim, V vocab, N layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.io_spec import CACHE_KINDS, CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS, LOGITS

CACHE_RANK, LOGITS_RANK, TOKENS_RANK = 4, 3, 2
STATIC_HINT = "python cli.py validate ART checks it in its artifact"
_OWNER = re.compile(r"(past|present)_(key_values?|kv)")
"""What a cache's name begins with: it says "key" and "value" of keys and of values alike."""


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; a size is a number, or None where it is dynamic."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """``past_key_values.0.key FLOAT [?, 2, ?, 8]``."""
        return f"{self.name} {self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a decoder.

    Attributes:
        input_ids: [B, S] of any integer type.
        attention_mask: [B, T], None where there is none.
        position_ids: [B, S] or [S], None where there are none.
        past: [B, K, P, D], keys and values of each layer in turn; empty where the graph takes no cache.
        logits: [B, S, V], or [B, 1, V].
        present: [B, K, T, D], in the same order; empty where the graph gives no cache.
        caches: how they were told apart: ``by name``, ``by order``, or ``none``.
    """

    input_ids: Port
    attention_mask: Port | None
    position_ids: Port | None
    past: tuple[Port, ...]
    logits: Port
    present: tuple[Port, ...]
    caches: str


def read_ports(model: ir.Model) -> Ports:
    """The inputs and outputs of a decoder's graph.

    Raises:
        FusionError: an input that is none of a decoder's, a part that is missing, or caches that do not belong together; it is named.
    """
    others = [_port(value) for value in model.graph.inputs if not value.is_initializer()]
    _refuse_static(others)
    past = [port for port in others if _is_cache(port)]
    others = [port for port in others if port not in past]
    mask = _take(others, lambda port: "mask" in port.name.lower() and len(port.shape) == TOKENS_RANK)
    positions = _take(others, lambda port: "position" in port.name.lower() and len(port.shape) in (1, TOKENS_RANK))
    ids = _take(others, lambda port: port.dtype.is_integer() and len(port.shape) == TOKENS_RANK)
    if ids is None:
        raise FusionError(f"no decoder: no token ids, an integer input [B, S], were found; it has {_listed(others) or 'no inputs'}")
    if others:
        raise FusionError(f"no decoder: input {others[0]} is neither token ids, positions [B, S], a mask [B, T] nor a cache [B, K, P, D]")
    present = [_port(value) for value in model.graph.outputs if _is_cache(_port(value))]
    if past and len(past) != len(present):
        raise FusionError(f"no decoder: {len(past)} caches enter and {len(present)} leave: {_listed(past)} → {_listed(present)}")
    order, how = _order(past or present)
    leaving = _order(present)[0] if _names_tell(present) else order
    return Ports(ids, mask, positions, tuple(past[i] for i in order if past), _logits(model), tuple(present[i] for i in leaving), how)


def _refuse_static(inputs: list[Port]) -> None:
    for port in inputs:
        if port.name in (CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS):
            raise FusionError(f"input {port.name} belongs to a cache of fixed capacity, which a lone file is not checked with", hint=STATIC_HINT)


def _order(caches: list[Port]) -> tuple[list[int], str]:
    """Indices of keys and values of each layer in turn, and how that was told."""
    indices = list(range(len(caches)))
    if not caches:
        return indices, "none"
    if not _names_tell(caches):
        return indices, "by order"
    return sorted(indices, key=lambda index: _place(caches[index].name) or (0, 0)), "by name"


def _names_tell(caches: list[Port]) -> bool:
    """Whether the names say layer and kind of every cache, each once."""
    places = {_place(port.name) for port in caches}
    return places == {(layer, kind) for layer in range(len(caches) // 2) for kind in range(len(CACHE_KINDS))}


def _place(name: str) -> tuple[int, int] | None:
    """(layer, 0 for keys or 1 for values) of a cache's name; None where it does not say both."""
    rest = _OWNER.sub("", name.lower())
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    kinds = [index for index, kind in enumerate(CACHE_KINDS) if kind in rest]
    if len(kinds) == 1 and len(numbers) == 1:
        return numbers[0], kinds[0]
    if not kinds and len(numbers) == len(CACHE_KINDS) and numbers[1] < len(CACHE_KINDS):
        return numbers[0], numbers[1]
    return None


def _logits(model: ir.Model) -> Port:
    found = [port for port in map(_port, model.graph.outputs) if port.dtype.is_floating_point() and len(port.shape) == LOGITS_RANK]
    named = [port for port in found if port.name == LOGITS]
    if len(named or found) != 1:
        raise FusionError(f"no decoder: one output [B, S, V] must be its logits; it has {_listed(found) or 'none'}")
    return (named or found)[0]


def _take(ports: list[Port], fits: Callable[[Port], bool]) -> Port | None:
    """Remove the first port that fits, and return it."""
    found = next((port for port in ports if fits(port)), None)
    if found is not None:
        ports.remove(found)
    return found


def _is_cache(port: Port) -> bool:
    return len(port.shape) == CACHE_RANK and "mask" not in port.name.lower() and port.dtype.is_floating_point()


def _port(value: ir.Value) -> Port:
    if value.shape is None or value.dtype is None:
        raise FusionError(f"no decoder: {value.name} has no {'shape' if value.shape is None else 'dtype'}")
    return Port(str(value.name), value.dtype, tuple(size if isinstance(size, int) else None for size in value.shape))


def _listed(ports: list[Port]) -> str:
    return ", ".join(map(str, ports[:4])) + (f" … ({len(ports)})" if len(ports) > 4 else "")
