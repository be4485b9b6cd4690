"""Rotary position embedding: the tables, and the rotation (half-split layout, as in Hugging Face's Llama).

Meta's checkpoints and GGUF files interleave the pairs instead; their readers put the rows of q_proj and k_proj in this order.
Source: RoFormer, arXiv:2104.09864 §3.2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from artifact.config import LlamaConfig


def rotary_tables(config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Returns:
        cos, sin: [max_position_embeddings, D/2] ``dtype``; angles in float32, then rounded, as Hugging Face does.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    inverse_frequencies = 1.0 / (config.rope_theta**exponents)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inverse_frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
