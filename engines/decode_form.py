"""Which form decode has where none is asked for: a matrix by a vector (``decode_gemv``) where a GPU was faster so, a GEMM elsewhere.

Timed on an H200 that ran plans for SM80 (docs/gpu-results.md): widths of 576 and 2,048 and 1, 2 and 4 rows were faster, 4,096 was not with several.
Rows read a weight in turn, which is cheap while it stays in the GPU's cache: so it is taken to hold for the A100, whose cache is nearly as large, and
for no other card.
"""

from __future__ import annotations

from artifact.config import LlamaConfig
from engines.device_fit import Load
from engines.profiles import SHORTEST_PREFILL
from engines.targets import Target

WIDEST, MOST_ROWS = 2048, 4
"""The widest hidden state and the most rows for which it was faster, with a dynamic cache."""
LARGE_CACHE = "a100"
"""How the names of the targets begin that it is taken to hold for: 40 MB of L2 cache, which holds a weight of such a width; the H200 has 50 MB."""


def suits(config: LlamaConfig, load: Load, target: Target, *, packed: bool, lowered: bool = False) -> bool:
    """Whether decode multiplies by a vector: where it can, in one plan, and should be faster.

    Args:
        config: of the model.
        load: what the engine is for.
        target: the GPU.
        packed: whether query, key and value are one linear.
        lowered: whether attention is in operators of an older TensorRT release.
    """
    can_be = packed and not lowered and load.precision == "fp16" and load.length > SHORTEST_PREFILL
    timed = load.kv_cache == "dynamic" and config.hidden_size <= WIDEST and load.batch <= MOST_ROWS
    return can_be and timed and target.name.startswith(LARGE_CACHE)
