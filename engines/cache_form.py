"""The two cache forms as a build knows them: which option bounds a conversation, and what build.json says of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import Dtype, KvCache, cache_bytes
from engines.profiles import default_length


def longest(kv_cache: KvCache, config: LlamaConfig, max_length: int | None, capacity: int | None) -> int:
    """Tokens that prompt and answer may have together: ``--max-length`` of a dynamic cache, ``--capacity`` of a static one.

    Raises:
        EngineError: the other form's option is given, or a static cache's is not; the hint names the right one.
    """
    default = default_length(config)
    if kv_cache == "dynamic" and capacity is not None:
        raise EngineError(
            "--capacity is for a static cache; the cache of this artifact is dynamic, and grows",
            hint=f"--max-length {capacity}, or export with --kv-cache static",
        )
    if kv_cache == "dynamic":
        return default if max_length is None else max_length
    if max_length is not None:
        raise EngineError(
            "--max-length is for a dynamic cache; prompt and answer fill a static one up to its capacity", hint=f"--capacity {max_length}"
        )
    if capacity is None:
        raise EngineError("a static cache needs --capacity: how many tokens prompt and answer may have together", hint=f"--capacity {default}")
    return capacity


def cache_entry(kv_cache: KvCache, config: LlamaConfig, dtype: Dtype, rows: int, length: int, counted: Mapping[str, int]) -> dict[str, Any]:
    """What build.json says of a cache.

    Args:
        kv_cache: its form.
        config, dtype: of the model.
        rows: that the profiles admit.
        length: tokens in prompt and answer together.
        counted: what a static cache asks of the network, as the backend counted it there.

    Returns:
        ``kv_cache``; for a static one ``capacity``, the device memory that its caller allots, and what was counted.
    """
    if kv_cache == "dynamic":
        return {"kv_cache": kv_cache}
    row = cache_bytes(config, dtype, length)
    return {"kv_cache": kv_cache, "capacity": length, "kv_cache_bytes_per_row": row, "kv_cache_bytes": rows * row, **counted}
