"""Optimization profiles: the range of every graph input, for prefill and for decode.

Two profiles, because TensorRT takes its decode attention kernel only where S is fixed to 1.
A profile bounds each axis alone. T = P + S can't be written into it, and needs not: T has its own upper bound, so whatever fits the
attention mask fits the engine. P may be 0 in both (measured: TensorRT-RTX 1.7.1 takes an empty cache).
Letters: B batch, S new tokens, P past, T = P + S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL, Dtype, graph_inputs

LONGEST_DEFAULT = 4096
TYPICAL_LENGTH = 512
"""Tokens that kernels are tuned for, in a prompt and in the cache of a decode step."""

LEAST_ROWS = {"int8": 2}
"""Precision → rows that the profiles must admit, used or not. Where rows and tokens are both fixed to 1, TensorRT-RTX 1.7.1 multiplies by a vector,
in a kernel that can't read INT8: each step writes every weight out as float16 first (8 such kernels in 2 layers of 7B widths; none with 2 rows)."""

Range = tuple[int, int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One optimization profile.

    Attributes:
        axes: axis name → (minimum, optimum, maximum).
        shapes: graph input → (minimum, optimum, maximum) shape, in graph order.
    """

    name: str
    axes: Mapping[str, Range]
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


def default_length(config: LlamaConfig) -> int:
    """Tokens that prompt and answer may have together where nothing is asked for: the model's, at most 4096."""
    return min(config.max_position_embeddings, LONGEST_DEFAULT)


def make_profiles(config: LlamaConfig, dtype: Dtype, *, max_batch: int, max_length: int) -> list[Profile]:
    """The prefill and the decode profile of a decoder graph with a dynamic cache.

    Args:
        config: gives the inputs' fixed sizes.
        dtype: of the cache.
        max_batch: rows, ≥ 1.
        max_length: tokens in prompt and answer together, 2 to the model's positions.

    Raises:
        EngineError: a bound that the model can't serve.
    """
    if max_batch < 1:
        raise EngineError(f"--max-batch must be at least 1, got {max_batch}")
    if not 2 <= max_length <= config.max_position_embeddings:
        positions = config.max_position_embeddings
        raise EngineError(
            f"--max-length must be between 2 and the model's {positions} positions, got {max_length}", hint=f"--max-length {default_length(config)}"
        )
    batch, prompt = (1, 1, max_batch), min(TYPICAL_LENGTH, max_length)
    cached = min(TYPICAL_LENGTH, max_length - 1)
    prefill = {BATCH: batch, SEQUENCE: (1, prompt, max_length), PAST: (0, 0, max_length - 1), TOTAL: (1, prompt, max_length)}
    decode = {BATCH: batch, SEQUENCE: (1, 1, 1), PAST: (0, cached, max_length - 1), TOTAL: (1, cached + 1, max_length)}
    return [_profile(name, axes, config, dtype) for name, axes in (("prefill", prefill), ("decode", decode))]


def _profile(name: str, axes: Mapping[str, Range], config: LlamaConfig, dtype: Dtype) -> Profile:
    minimum, optimum, maximum = ({axis: sizes[i] for axis, sizes in axes.items()} for i in range(3))
    shapes = {value.name: (value.sizes(**minimum), value.sizes(**optimum), value.sizes(**maximum)) for value in graph_inputs(config, dtype)}
    return Profile(name, axes, shapes)
