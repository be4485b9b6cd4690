"""What kernels of a plan do and write: the words of ``build.json``.

Letters: B batch, S new tokens, T past and new, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

ATTENTION, GEMM, PRODUCT, SOFTMAX, CACHE, NORM, ROTARY, COPY, CAST, POINTWISE = (
    "attention", "gemm", "product", "softmax", "cache", "norm", "rotary", "copy", "cast", "pointwise",
)  # fmt: skip
"""Kinds: ``gemm`` multiplies by a weight, ``product`` two activations; ``cache`` writes keys and values (and rotates them on the way)."""
REPEATED, COPIED, SCORES = "repeated keys or values", "copied keys or values", "scores"
"""What a kernel may write beside the graph's outputs: [B, H, T, D] of K < H heads, [B, K, T, D], and [B, H, S, T]."""
Description = dict[str, Any]
"""What a profile holds, as ``plan_layers.describe`` gives it."""
