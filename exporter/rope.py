"""Rotary position embedding: the tables, and the rotation (half-split layout, as in Hugging Face's Llama).

Meta's checkpoints and GGUF files interleave the pairs instead; their readers put the rows of q_proj and k_proj in this order.
Source: RoFormer, arXiv:2104.09864 §3.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.rope_scaling import RopeScaling

INTERLEAVED = tuple(f".self_attn.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias"))
"""Endings of the tensors whose rows ``deinterleave`` puts in order."""


def rotary_tables(config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, scaled as the model scales them.

    Returns:
        cos, sin: [max_position_embeddings, D/2] ``dtype``; angles in float32, then rounded, as Hugging Face does.
    """
    positions = range(config.max_position_embeddings)
    return rotary_rows(config, torch.cos, positions).to(dtype), rotary_rows(config, torch.sin, positions).to(dtype)


def rotary_rows(config: LlamaConfig, function: Callable[[Tensor], Tensor], positions: range) -> Tensor:
    """Rows of one table, before they are rounded: ``function`` is torch.cos or torch.sin; [len(positions), D/2] float32."""
    scaling = config.rope_scaling
    attention_factor = 1.0 if scaling is None or scaling.attention_factor is None else scaling.attention_factor
    steps = torch.arange(positions.start, positions.stop, dtype=torch.float32, device="cpu")
    return function(torch.outer(steps, inverse_frequencies(config))) * attention_factor


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position turns each pair by: [D/2] float32, falling from about 1; bit for bit what transformers computes."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    periods = config.rope_theta**exponents  # positions per radian
    return 1.0 / periods if config.rope_scaling is None else SCALED[config.rope_scaling.rope_type](periods, config.rope_scaling, config)


def _linear(periods: Tensor, scaling: RopeScaling, config: LlamaConfig) -> Tensor:
    """Every frequency divided by one factor: positions are interpolated (arXiv:2306.15595)."""
    return 1.0 / periods / _given(scaling.factor)


def _dynamic(periods: Tensor, scaling: RopeScaling, config: LlamaConfig) -> Tensor:
    """As they are: dynamic NTK changes them only for a text longer than max_position_embeddings, where the tables end."""
    return 1.0 / periods


def _llama3(periods: Tensor, scaling: RopeScaling, config: LlamaConfig) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, those between blended by how often they turn in the original length."""
    factor, low, high = _given(scaling.factor), _given(scaling.low_freq_factor), _given(scaling.high_freq_factor)
    length = _given(scaling.original_max_position_embeddings)
    plain = 1.0 / periods
    wavelengths = 2 * math.pi / plain
    kept = (length / wavelengths - low) / (high - low)
    blended = (1 - kept) * plain / factor + kept * plain
    scaled = torch.where(wavelengths > length / low, plain / factor, blended)
    return torch.where(wavelengths < length / high, plain, scaled)


def _yarn(periods: Tensor, scaling: RopeScaling, config: LlamaConfig) -> Tensor:
    """Interpolated and plain frequencies, blended by a ramp between two pairs (arXiv:2309.00071 §3.2)."""
    length = _given(scaling.original_max_position_embeddings)
    first, last = (_pair_that_turns(_given(turns), length, config) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = last - first if last != first else RAMP_OF_NO_WIDTH
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32, device="cpu") - first) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (_given(scaling.factor) * periods) * (1 - kept) + 1.0 / periods * kept


def _pair_that_turns(turns: float, length: float, config: LlamaConfig) -> float:
    """Which pair (a fraction) turns so many times within ``length`` positions; LlamaConfig has seen to it that rope_theta is above 1."""
    return config.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def _by_factors(periods: Tensor, scaling: RopeScaling, config: LlamaConfig) -> Tensor:
    """Each frequency divided by its own factor."""
    return 1.0 / (torch.tensor(scaling.frequency_factors, dtype=torch.float32, device="cpu") * periods)


def _given(value: float | None) -> float:
    assert value is not None  # every kind has its own numbers: artifact/rope_scaling.py
    return value


SCALED: Mapping[str, Callable[[Tensor, RopeScaling, LlamaConfig], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _by_factors,
}
"""``rope_type`` → (positions per radian of the unscaled model [D/2], scaling, config) → radians per position [D/2]."""
RAMP_OF_NO_WIDTH = 0.001


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate query or key vectors by position.

    Args:
        x: [B, H, S, D] float16 | float32, D even.
        cos, sin: [B, 1, S, D/2], dtype of ``x``.

    Returns:
        [B, H, S, D], dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def deinterleave(weight: Tensor, head_dim: int) -> Tensor:
    """Undo Meta's and GGUF's row order of q and k: pairs (0, 1), (2, 3), … of a head become (0, D/2), (1, D/2 + 1), ….

    Args:
        weight: [heads·D, in] or a bias [heads·D], rows 2i and 2i + 1 of a head rotate together.
        head_dim: D.

    Returns:
        The same shape, rows i and i + D/2 of a head rotate together (Hugging Face's half-split layout).
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])  # [heads, D/2, 2, in]
    return pairs.transpose(1, 2).flatten(0, 2)
