"""Every graph input and output: names, dtypes, axes and ranges. The one place that names them.

Letters: B batch, S new tokens, P past, T = P + S, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from artifact.config import LlamaConfig

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
OPSET = 23
Dtype = Literal["fp16", "fp32"]
CACHE_KINDS = ("key", "value")

INPUT_IDS, ATTENTION_MASK, POSITION_IDS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"


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
    return f"past_key_values.{layer}.{kind}"


def present_name(layer: int, kind: str) -> str:
    """Graph output of a layer's cache; kind is ``key`` or ``value``."""
    return f"present.{layer}.{kind}"


def graph_inputs(config: LlamaConfig, dtype: Dtype) -> list[GraphValue]:
    """Inputs of a decoder graph with a dynamic cache, in order; P may be 0."""
    cache = (BATCH, config.num_key_value_heads, PAST, config.head_dim)
    return [
        GraphValue(INPUT_IDS, "int64", (BATCH, SEQUENCE)),
        GraphValue(ATTENTION_MASK, "int64", (BATCH, TOTAL)),
        GraphValue(POSITION_IDS, "int64", (BATCH, SEQUENCE)),
        *(GraphValue(past_name(i, kind), dtype, cache) for i in range(config.num_hidden_layers) for kind in CACHE_KINDS),
    ]


def graph_outputs(config: LlamaConfig, dtype: Dtype, *, one_position: bool = False) -> list[GraphValue]:
    """Outputs of a decoder graph, in order; an engine graph has logits [B, 1, V] (``one_position``)."""
    cache = (BATCH, config.num_key_value_heads, TOTAL, config.head_dim)
    return [
        GraphValue(LOGITS, dtype, (BATCH, 1 if one_position else SEQUENCE, config.vocab_size)),
        *(GraphValue(present_name(i, kind), dtype, cache) for i in range(config.num_hidden_layers) for kind in CACHE_KINDS),
    ]
