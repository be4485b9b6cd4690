"""What `validate --bisect` and `--edges` have in memory: one layer in float32, its largest linear as it is read, and the calls.

Letters: E hidden, H heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES
from engines.edge_calls import LARGEST_CACHE, LONGEST_CALL, cache_bytes
from engines.profiles import DEFAULT_BATCH, TYPICAL_LENGTH, default_length
from engines.step_cost import TORCH_MEMORY, layer_float32
from engines.weight_sizes import largest_linear

COPIES = 2
"""Of the largest linear, while it is read: dequantised and turned."""
CACHES = 4
"""The past, which both sides read; what each side leaves; and one for the copies of a node while it runs."""
SCORES = 3
"""Arrays of the size of attention's scores that are alive together."""


def closer_memory(config: LlamaConfig, *, edges: bool) -> int:
    """Peak anonymous memory of narrowing; with the calls at the edges of the profiles that ``build`` takes by default.

    Two layers at 13B widths, fused and int8, measured 3,041 and 3,079 MB, with edges 3,678 and 3,701 (when each side had a past of its own); at 7B
    widths, fused with edges, 3,630.
    """
    largest = max(largest_linear(config), config.vocab_size * config.hidden_size) * DTYPE_BYTES["fp32"]
    return TORCH_MEMORY + layer_float32(config) + max(COPIES * largest, _calls(config) if edges else 0)


def _calls(config: LlamaConfig) -> int:
    """The largest of the calls that are made: many rows take one new token each, and many new tokens are one row's."""
    length = default_length(config)
    calls = [(batch, new) for batch in (1, DEFAULT_BATCH) for new in (1, min(TYPICAL_LENGTH, length), length) if batch * new <= LONGEST_CALL]
    made = [call for call in calls if cache_bytes(config, call[0], length) <= LARGEST_CACHE]
    return max((_call(config, batch, new, length) for batch, new in made), default=0)


def _call(config: LlamaConfig, batch: int, new: int, length: int) -> int:
    scores = DTYPE_BYTES["fp32"] * batch * config.num_attention_heads * new * length
    return CACHES * cache_bytes(config, batch, length) + SCORES * scores
