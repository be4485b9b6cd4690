"""Every graph input and output: names, dtypes, axes and ranges. The one place that names them.

Two cache forms. Dynamic: the new keys and values are appended to the past ones. Static: they are written into a cache of fixed capacity.
Letters: B batch, S new tokens, P past, T = P + S, C capacity, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from artifact.config import LlamaConfig

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
CAPACITY = "cache_capacity"
Dtype = Literal["fp16", "fp32"]
NUMPY_DTYPES: dict[Dtype, Any] = {"fp16": np.float16, "fp32": np.float32}
DTYPE_BYTES: dict[Dtype, int] = {"fp16": 2, "fp32": 4}
KvCache = Literal["dynamic", "static"]
OPSETS: dict[KvCache, int] = {"dynamic": 23, "static": 24}
"""TensorScatter, which writes into a static cache, came with opset 24."""
CACHE_KINDS = ("key", "value")

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS = "cache_write_indices", "key_value_lengths"
LAST_TOKEN_INDICES = "last_token_indices"
_PAST_PREFIX = "past_key_values."
HIDDEN_PREFIX = "hidden_states."
"""Of hidden_name, whatever the layer."""
_PRESENT = re.compile(r"present\.(\d+)\.\w+")


@dataclass(frozen=True)
class GraphValue:
    """One graph input or output.

    Attributes:
        dtype: ``int64``, ``fp16`` or ``fp32``.
        shape: sizes, and axis names where the size is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def sizes(self, **axes: int) -> tuple[int, ...]:
        """The shape with every axis name replaced: ``sizes(batch_size=1, …)``."""
        return tuple(size if isinstance(size, int) else axes[size] for size in self.shape)


def past_name(layer: int, kind: str) -> str:
    """Graph input of a layer's cache; kind is ``key`` or ``value``."""
    return f"{_PAST_PREFIX}{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """Graph output of a layer's cache; kind is ``key`` or ``value``."""
    return f"present.{layer}.{kind}"


def cache_names(config: LlamaConfig) -> list[tuple[str, str]]:
    """(past, present): input and output of keys and values of each layer in turn."""
    slots = [(layer, kind) for layer in range(config.num_hidden_layers) for kind in CACHE_KINDS]
    return [(past_name(*slot), present_name(*slot)) for slot in slots]


def graph_inputs(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache = "dynamic", *, one_position: bool = False) -> list[GraphValue]:
    """Inputs of a decoder graph, in order.

    Dynamic cache: P may be 0. Static cache, row b of a call with S new tokens:
        cache_write_indices[b]: the slot of its first new token; at most C − S.
        key_value_lengths[b]: how many slots hold something afterwards, ``cache_write_indices[b] + S``: right padding is written too, and
            overwritten by the tokens that follow.
        position_ids[b]: ``cache_write_indices[b] + 0 … S−1``, padding too: a graph may rotate by slots (graphs/fusions/grouped_static_attention.py).
            In ONNX Runtime's own operators several new tokens over a past need a batch of one.
        past_key_values: finite everywhere (zeros at the start): what is masked is multiplied by 0, and 0 · NaN is NaN.
        last_token_indices[b]: in an engine graph (``one_position``), which of its S new tokens gives the row's logits: the last real one, below S.
    """
    by_row = [CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS, *([LAST_TOKEN_INDICES] if one_position else [])] if kv_cache == "static" else []
    return [
        GraphValue(INPUT_IDS, "int64", (BATCH, SEQUENCE)),
        *([GraphValue(ATTENTION_MASK, "int64", (BATCH, TOTAL))] if kv_cache == "dynamic" else []),
        GraphValue(POSITION_IDS, "int64", (BATCH, SEQUENCE)),
        *(GraphValue(name, "int64", (BATCH,)) for name in by_row),
        *_caches(config, dtype, past_name, PAST if kv_cache == "dynamic" else CAPACITY),
    ]


def graph_outputs(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache = "dynamic", *, one_position: bool = False) -> list[GraphValue]:
    """Outputs of a decoder graph, in order; an engine graph has logits [B, 1, V] (``one_position``)."""
    return [
        GraphValue(LOGITS, dtype, (BATCH, 1 if one_position else SEQUENCE, config.vocab_size)),
        *_caches(config, dtype, present_name, TOTAL if kv_cache == "dynamic" else CAPACITY),
    ]


def hidden_name(layer: int) -> str:
    """The hidden state that enters a layer, where a model is cut into parts there."""
    return f"{HIDDEN_PREFIX}{layer}"


def present_layer(name: str) -> int | None:
    """Layer of a ``present_name``; None for any other name."""
    match = _PRESENT.fullmatch(name)
    return int(match[1]) if match else None


def part_inputs(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache, layers: tuple[int, int]) -> list[GraphValue]:
    """Inputs of the part of an engine graph that holds layers ``first`` to ``last``, in order.

    A part that does not begin with layer 0 reads a hidden state [B, S, E] in the place of ``input_ids``, one that does not end with the last layer
    needs no ``last_token_indices``; caches are those of its layers, under the whole's names. The part of all layers is the engine graph.
    """
    first, last = layers
    own = {past_name(layer, kind) for layer in range(first, last + 1) for kind in CACHE_KINDS}
    whole = graph_inputs(config, dtype, kv_cache, one_position=last + 1 == config.num_hidden_layers)
    hidden = GraphValue(hidden_name(first), dtype, (BATCH, SEQUENCE, config.hidden_size))
    kept = [value for value in whole if value.name in own or not value.name.startswith(_PAST_PREFIX)]
    return [hidden if value.name == INPUT_IDS and first else value for value in kept]


def part_outputs(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache, layers: tuple[int, int]) -> list[GraphValue]:
    """Outputs of that part, in order: logits [B, 1, V] of the last part, a hidden state of any other, and the caches of its layers."""
    first, last = layers
    logits, *caches = graph_outputs(config, dtype, kv_cache, one_position=True)
    hidden = GraphValue(hidden_name(last + 1), dtype, (BATCH, SEQUENCE, config.hidden_size))
    own = {present_name(layer, kind) for layer in range(first, last + 1) for kind in CACHE_KINDS}
    return [logits if last + 1 == config.num_hidden_layers else hidden, *(value for value in caches if value.name in own)]


def cache_bytes(config: LlamaConfig, dtype: Dtype, n_slots: int) -> int:
    """Bytes of one row's keys and values in all layers, for a number of slots."""
    per_slot = len(CACHE_KINDS) * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[dtype]
    return config.num_hidden_layers * per_slot * n_slots


def _caches(config: LlamaConfig, dtype: Dtype, name: Callable[[int, str], str], length: str) -> list[GraphValue]:
    shape = (BATCH, config.num_key_value_heads, length, config.head_dim)
    return [GraphValue(name(layer, kind), dtype, shape) for layer in range(config.num_hidden_layers) for kind in CACHE_KINDS]
