"""Optimization profiles: the range of every graph input, for prefill and for decode.

Two profiles, because TensorRT takes its decode attention kernel only where S is fixed to 1.
A profile bounds each axis alone. T = P + S can't be written into it, and needs not: T has its own upper bound, so whatever fits the
attention mask fits the engine. P may be 0 in both (measured: TensorRT-RTX 1.7.1 takes an empty cache).
A static cache has one size, its capacity C, in both profiles; a prompt may fill it.
Letters: B batch, S new tokens, P past, T = P + S, C capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import BATCH, CAPACITY, PAST, SEQUENCE, TOTAL, Dtype, GraphValue, KvCache, part_inputs

DEFAULT_BATCH, LONGEST_DEFAULT = 4, 4096
"""Rows, and tokens at most, where nothing is asked for."""
TYPICAL_LENGTH = 512
"""Tokens that kernels are tuned for, in a prompt and in the cache of a decode step."""

LEAST_ROWS = {"int8": 2, "int8-smoothquant": 2, "int4": 2}
"""Precision → rows that the profiles must admit, used or not. Where rows and tokens are both fixed to 1, TensorRT-RTX 1.7.1 multiplies by a vector,
in a kernel that can't read INT8 or INT4: each step writes every weight out as float16 first
(INT8: 8 such kernels in 2 layers of 7B widths; none with 2 rows)."""

SHORTEST_PREFILL = 2
"""New tokens where decode multiplies by a vector: only then does TensorRT-RTX know in each profile which form of a linear is meant."""

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


def make_profiles(
    config: LlamaConfig,
    dtype: Dtype,
    kv_cache: KvCache = "dynamic",
    *,
    max_batch: int,
    max_length: int,
    layers: tuple[int, int] | None = None,
    gemv: bool = False,
) -> list[Profile]:
    """The prefill and the decode profile of an engine graph, or of a part of one.

    Args:
        config: gives the inputs' fixed sizes.
        dtype: of the cache.
        kv_cache: its form.
        max_batch: rows, ≥ 1.
        layers: first and last of a part; None is the whole.
        max_length: tokens in prompt and answer together, 2 to the model's positions, 3 with ``gemv``; of a static cache its capacity.
        gemv: decode multiplies by a vector, and prefill begins behind it (``decode_gemv``); else one token is either's.

    Raises:
        EngineError: a bound that the model can't serve.
    """
    shortest = SHORTEST_PREFILL if gemv else 1
    option = "--max-length" if kv_cache == "dynamic" else "--capacity"
    _check_bounds(config, max_batch, max_length, option, least=shortest + 1)
    axes = _dynamic_axes(max_length, shortest) if kv_cache == "dynamic" else _static_axes(max_length, shortest)
    inputs = part_inputs(config, dtype, kv_cache, layers or (0, config.num_hidden_layers - 1))
    return [_profile(name, {BATCH: (1, 1, max_batch), **ranges}, inputs) for name, ranges in axes.items()]


def _dynamic_axes(max_length: int, shortest: int) -> dict[str, dict[str, Range]]:
    prompt, cached = min(TYPICAL_LENGTH, max_length), min(TYPICAL_LENGTH, max_length - 1)
    return {
        "prefill": {SEQUENCE: (shortest, prompt, max_length), PAST: (0, 0, max_length - 1), TOTAL: (shortest, prompt, max_length)},
        "decode": {SEQUENCE: (1, 1, 1), PAST: (0, cached, max_length - 1), TOTAL: (1, cached + 1, max_length)},
    }


def _static_axes(capacity: int, shortest: int) -> dict[str, dict[str, Range]]:
    fixed: dict[str, Range] = {CAPACITY: (capacity, capacity, capacity)}
    return {"prefill": {SEQUENCE: (shortest, min(TYPICAL_LENGTH, capacity), capacity), **fixed}, "decode": {SEQUENCE: (1, 1, 1), **fixed}}


def _check_bounds(config: LlamaConfig, max_batch: int, length: int, option: str, *, least: int) -> None:
    positions = config.max_position_embeddings
    if max_batch < 1:
        raise EngineError(f"--max-batch must be at least 1, got {max_batch}")
    if not least <= length <= positions:
        hint = f"{option} {default_length(config)}"
        raise EngineError(f"{option} must be between {least} and the model's {positions} positions, got {length}", hint=hint)


def _profile(name: str, axes: Mapping[str, Range], inputs: Sequence[GraphValue]) -> Profile:
    minimum, optimum, maximum = ({axis: sizes[i] for axis, sizes in axes.items()} for i in range(3))
    shapes = {value.name: (value.sizes(**minimum), value.sizes(**optimum), value.sizes(**maximum)) for value in inputs}
    return Profile(name, axes, shapes)
