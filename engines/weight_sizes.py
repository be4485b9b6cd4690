"""How many bytes the weights of an engine graph take in each precision, before there is one.

Letters: L decoder layers, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import DTYPE_BYTES, Dtype
from artifact.layout import EMBEDDING, LM_HEAD, PACKED, has_bias, linear_shapes, shared_shapes
from engines.form_limits import QUANTIZED_BITS, QUANTIZED_TYPES

SCALE_BYTES = {"int8": 2, "int8-smoothquant": 4, "int4": 2}
"""Precision → bytes of a scale."""
INT4_BLOCKS = (128, 64, 32)
"""The widest that divides a row shares a scale; int8 has one scale a row."""


def float_dtype(precision: str) -> Dtype:
    """Of the artifact that an engine of a precision is made from: its caches, activations, and what is not quantised."""
    return "fp32" if precision == "fp32" else "fp16"


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of an engine's weights by where they are; a tied lm_head is the embedding, and counts there.

    Attributes:
        layer: one decoder layer.
        embedding: the table that input ids are looked up in.
        tail: final norm, and lm_head unless it is tied.
        rotary: the cos and sin tables.
        lm_head: what the last product reads, tied or not.
        turned: of a layer, levels that lie as [out, in]: of every quantised precision but int8.
        layers: L.
    """

    layer: int
    embedding: int
    tail: int
    rotary: int
    lm_head: int
    layers: int
    turned: int = 0

    @property
    def total(self) -> int:
        """All weights, each once."""
        return self.layers * self.layer + self.embedding + self.tail + self.rotary

    @property
    def read_by_a_step(self) -> int:
        """What one decode step reads of them: every layer and lm_head; of the embedding it needs a row."""
        return self.layers * self.layer + self.lm_head

    def of_part(self, first: int, last: int, *, tied: bool) -> int:
        """Bytes of the layers ``first`` … ``last`` as a part: the first part has the embedding, the last lm_head, each the rotary tables."""
        ends = (first == 0) * self.embedding + (last == self.layers - 1) * (self.tail + tied * (first > 0) * self.embedding)
        return (last - first + 1) * self.layer + self.rotary + ends


def weight_sizes(config: LlamaConfig, precision: str) -> WeightSizes:
    """Sizes for one precision.

    Args:
        config: of the model.
        precision: ``fp32``, ``fp16``, ``int8``, ``int8-smoothquant`` (every linear by int8) or ``int4``.
    """
    float_bytes = DTYPE_BYTES[float_dtype(precision)]
    shared = {name: prod(shape) * float_bytes for name, shape in shared_shapes(config).items()}
    return WeightSizes(
        layer=sum(_linear_bytes(shape, precision) for shape in linear_shapes(config).values()) + _vectors(config) * float_bytes,
        embedding=shared[EMBEDDING],
        tail=sum(shared.values()) - shared[EMBEDDING],
        rotary=config.max_position_embeddings * config.head_dim * float_bytes,  # [positions, D / 2], twice
        lm_head=shared.get(LM_HEAD, shared[EMBEDDING]),
        layers=config.num_hidden_layers,
        turned=_turned_bytes(config, precision),
    )


def linear_parameters(config: LlamaConfig) -> int:
    """Parameters of all layers' linears, without lm_head."""
    return config.num_hidden_layers * sum(map(prod, linear_shapes(config).values()))


def largest_linear(config: LlamaConfig) -> int:
    """Parameters of a layer's largest linear, q·k·v and gate·up packed."""
    alone = {name: prod(shape) for name, shape in linear_shapes(config).items()}
    return max(*(sum(alone[member] for member in members) for members in PACKED.values()), *alone.values())


def _turned_bytes(config: LlamaConfig, precision: str) -> int:
    dtype = QUANTIZED_TYPES.get(precision)
    return 0 if dtype is None or precision == "int8" else sum(map(prod, linear_shapes(config).values())) * QUANTIZED_BITS[dtype] // 8


def _vectors(config: LlamaConfig) -> int:
    """Parameters of one layer's norms and biases."""
    return 2 * config.hidden_size + sum(rows for name, (rows, _) in linear_shapes(config).items() if has_bias(config, name))


def _linear_bytes(shape: tuple[int, int], precision: str) -> int:
    rows, columns = shape
    dtype = QUANTIZED_TYPES.get(precision)
    if dtype is None:
        return rows * columns * DTYPE_BYTES[float_dtype(precision)]
    return rows * columns * QUANTIZED_BITS[dtype] // 8 + rows * _scales_a_row(columns, precision) * SCALE_BYTES[precision]


def _scales_a_row(columns: int, precision: str) -> int:
    return ceil(columns / int4_block(columns)) if precision == "int4" else 1


def int4_block(columns: int) -> int:
    """Columns of a row that share a scale of INT4: the widest that divides it, the narrowest where none does."""
    return next((size for size in INT4_BLOCKS if columns % size == 0), INT4_BLOCKS[-1])


def check_blocks(config: LlamaConfig, precision: str) -> None:
    """Refuse INT4 where a row can't be cut into blocks.

    Raises:
        EngineError: names the linear.
    """
    for name, (_, columns) in linear_shapes(config).items():
        if precision == "int4" and columns % int4_block(columns):
            blocks = ", ".join(map(str, INT4_BLOCKS))
            raise EngineError(f"{name}: rows of {columns} weights can't be cut into blocks of {blocks}", hint="--precision int8 needs no blocks")
