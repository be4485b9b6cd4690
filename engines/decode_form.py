"""Which form decode has where none is asked for: a matrix by a vector (``decode_gemv``) where a GPU was faster so, a GEMM elsewhere."""

from __future__ import annotations

from artifact.config import LlamaConfig
from engines.device_fit import Load
from engines.profiles import SHORTEST_PREFILL

WIDEST, MOST_ROWS = 2048, 4
"""The widest hidden state and the most rows for which a GPU was faster so, with a dynamic cache (docs/gpu-results.md)."""


def suits(config: LlamaConfig, load: Load, *, packed: bool, lowered: bool = False) -> bool:
    """Whether decode multiplies by a vector: where it can, in one plan, and was measured to be faster.

    Args:
        config: of the model.
        load: what the engine is for.
        packed: whether query, key and value are one linear.
        lowered: whether attention is in operators of an older TensorRT release.
    """
    can_be = packed and not lowered and load.precision == "fp16" and load.length > SHORTEST_PREFILL
    return can_be and load.kv_cache == "dynamic" and config.hidden_size <= WIDEST and load.batch <= MOST_ROWS
