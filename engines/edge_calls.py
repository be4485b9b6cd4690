"""How large a call at the edge of a profile may be where it is computed without a GPU (``validate --edges``)."""

from __future__ import annotations

from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES

LONGEST_CALL = 512
"""New tokens of all rows that are computed in a call."""
LARGEST_CACHE = 1 << 29
"""Bytes of one layer's keys and values in float32 on one side."""


def cache_bytes(config: LlamaConfig, batch: int, length: int) -> int:
    """Keys and values of one layer in float32."""
    return 2 * DTYPE_BYTES["fp32"] * batch * length * config.num_key_value_heads * config.head_dim
