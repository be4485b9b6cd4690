"""How a GGUF file says that rotary frequencies are scaled: keys under ``rope.scaling``, or a tensor of one divisor for each pair.

Meanings are those of llama.cpp, which the files are written for: a factor without a type is linear, and YaRN's own factor on cosine and
sine is always applied, with ``attn_factor`` on top.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.numbers import positive_integer, positive_number
from artifact.rope_scaling import RopeScaling, yarn_attention_factor
from exporter.rope import inverse_frequencies

LENGTH = "rope.scaling.original_context_length"
USED = frozenset(
    {
        *("rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor", LENGTH),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    }
)
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0, 1.0),
}
"""Keys (after ``llama.``) that change the scaling, with the values that leave it as it is."""
TENSOR = "rope_freqs.weight"
PUBLISHED = ((1.0, 4.0, 8192),)
"""low_freq_factor, high_freq_factor and original length of the published Llama 3.1 to 3.3; the factor stands in the tensor."""
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Of the numbers that float32 holds."""
SAME_FACTOR = 2e-6
"""Relative: the converter and we compute the factors from float32 frequencies."""


def scaling_from_keys(keys: Mapping[str, Any], context_length: int) -> RopeScaling | None:
    """The scaling that the metadata says.

    Args:
        keys: metadata after ``llama.``.
        context_length: the model's.

    Raises:
        CheckpointError: another kind, or a value that is not supported.
    """
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in KINDS:
        raise CheckpointError(f"GGUF: llama.rope.scaling.type = {kind!r} is not supported; supported: {', '.join(map(repr, KINDS))}")
    if kind != "yarn" and stored_number(keys, "rope.scaling.attn_factor", 1.0) != 1.0:
        raise CheckpointError(f"GGUF: llama.rope.scaling.attn_factor = {keys['rope.scaling.attn_factor']!r} is supported with type 'yarn' alone")
    return KINDS[kind](keys, context_length)


def with_frequency_factors(config: LlamaConfig, factors: Tensor) -> tuple[LlamaConfig, list[str]]:
    """The config with the scaling that a ``rope_freqs.weight`` holds, and a note on it.

    Factors that the published llama3 parameters give are named so; any others are carried as they are, which is as exact.

    Args:
        config: what the metadata says.
        factors: D/2 divisors of the frequencies; all 1 is no scaling.

    Raises:
        CheckpointError: another number of factors, one that is not positive, or a second scaling in the metadata.
    """
    if factors.shape != (config.head_dim // 2,) or not bool((factors.isfinite() & (factors > 0)).all()):
        raise CheckpointError(f"GGUF: {TENSOR} must hold {config.head_dim // 2} positive factors, it is {list(factors.shape)}")
    if bool((factors == 1).all()):
        return config, []
    if config.rope_scaling is not None:
        raise CheckpointError(f"GGUF: {TENSOR} and llama.rope.scaling.type = {config.rope_scaling.rope_type!r} at once are not supported")
    for low, high, length in PUBLISHED:
        scaling = RopeScaling(
            rope_type="llama3",
            factor=shortest(float(factors.max())),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=length,
        )
        named = replace(config, rope_scaling=scaling)
        if bool(torch.isclose(inverse_frequencies(config) / inverse_frequencies(named), factors, rtol=SAME_FACTOR, atol=0).all()):
            return named, [f"{TENSOR} holds the factors of rope_type 'llama3', factor {scaling.factor:g}"]
    listed = RopeScaling(rope_type="longrope", attention_factor=1.0, frequency_factors=tuple(factors.tolist()))
    return replace(config, rope_scaling=listed), [f"{TENSOR} holds factors that no published model has; config.json lists them as they are"]


def shortest(value: float) -> float:
    """The decimal number that a float32 was written as: 9.999999747378752e-06 → 1e-05."""
    return float(str(np.float32(value)))


def _linear(keys: Mapping[str, Any], context_length: int) -> RopeScaling | None:
    factor = _factor(keys)
    return None if factor == 1 else RopeScaling(rope_type="linear", factor=factor)


def _yarn(keys: Mapping[str, Any], context_length: int) -> RopeScaling:
    factor = _factor(keys)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=positive_integer(f"GGUF: llama.{LENGTH}", keys.get(LENGTH, context_length)),
        attention_factor=stored_number(keys, "rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor),
        beta_fast=stored_number(keys, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=stored_number(keys, "rope.scaling.yarn_beta_slow", 1.0),
        truncate=True,
    )


def _factor(keys: Mapping[str, Any]) -> float:
    """The factor under its present name, or the one before; 0 is none."""
    name = "rope.scaling.factor" if "rope.scaling.factor" in keys else "rope.scale_linear"
    return 1.0 if keys.get(name) == 0 else stored_number(keys, name, 1.0)


def stored_number(keys: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number among the keys after ``llama.``, as it was written; a key without a default must be there.

    Raises:
        CheckpointError: absent, of another type, not above 0, or not a number that float32 holds.
    """
    value = positive_number(f"GGUF: llama.{name}", keys.get(name, default))
    if not SMALLEST <= value <= LARGEST:
        raise CheckpointError(f"GGUF: llama.{name} must be a number that float32 holds, got {value!r}")
    return shortest(value)


KINDS: Mapping[str, Callable[[Mapping[str, Any], int], RopeScaling | None]] = {
    "none": lambda keys, context_length: None,
    "linear": _linear,
    "yarn": _yarn,
}
"""``rope.scaling.type`` → how it is read; any other is refused by name."""
