"""Does an engine fit its GPU: weights, caches at the largest batch and length, and what the kernels need between them; if not, what would.

Letters: B batch, S new tokens, T past and new, L layers, E hidden, F ffn, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES, Dtype, KvCache, cache_bytes
from artifact.room import gigabytes
from engines.targets import Target
from engines.weight_sizes import weight_sizes

RESERVED_BYTES = 600_000_000
"""What the CUDA context, its libraries and the runtime take of a GPU before a model is there."""
CACHE_SETS = {"dynamic": 2, "static": 1}
"""Form → sets of cache buffers: a growing cache is read from one and written to another, a static one is written in place."""
SCRATCH_BYTES = 8_000_000
"""What the GEMMs of a profile share, at any width."""
MOST_GPUS = 8
LEAST_LENGTH = 256
OTHERS = ("int8", "int4")
"""Precisions that are offered where a larger one does not fit."""


@dataclass(frozen=True)
class Load:
    """What an engine is used for.

    Attributes:
        precision: of the engine.
        batch, length: B, and tokens in prompt and answer together.
        kv_cache: its form.
    """

    precision: str
    batch: int
    length: int
    kv_cache: KvCache = "dynamic"

    @property
    def dtype(self) -> Dtype:
        """Of cache and activations."""
        return "fp32" if self.precision == "fp32" else "fp16"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the GPU, or on each of several that share the layers."""

    weights: int
    kv_cache: int
    activations: int
    reserved: int = RESERVED_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations + self.reserved


def device_memory(config: LlamaConfig, load: Load) -> DeviceMemory:
    """What the whole model takes on one GPU."""
    caches = CACHE_SETS[load.kv_cache] * load.batch * cache_bytes(config, load.dtype, load.length)
    return DeviceMemory(weight_sizes(config, load.precision).total, caches, activation_bytes(config, load))


def activation_bytes(config: LlamaConfig, load: Load) -> int:
    """What lives between the kernels of the largest prefill (S = T = length), as TensorRT-RTX 1.7.1 lays it out; a built plan states its own.

    gate·up and their product; keys and values turned for attention, the query, attention's result, the residual; and a mask that all layers share,
    one number a query and key. Measured: SmolLM2 350 MB, 13B widths 2,334 MB, both at 4 rows of 4,096 tokens; within 1.5 %.
    """
    rows, query, key = load.batch * load.length, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    widths = 3 * config.intermediate_size + 2 * query + 2 * key + config.hidden_size
    return rows * (widths + load.length) * DTYPE_BYTES[load.dtype] + SCRATCH_BYTES


def fit(config: LlamaConfig, load: Load, target: Target) -> dict[str, Any]:
    """Whether an engine fits one GPU, how many it takes if not, and what else would fit.

    Args:
        config: of the model.
        load: precision, batch and length.
        target: the GPU.

    Returns:
        ``target``, ``memory_bytes``, ``needs`` {weights, kv_cache, activations, reserved, total}, ``fits``, ``gpus`` (None: more than 8),
        ``words``, ``instead`` [words of what would fit one GPU or more].
    """
    needs = device_memory(config, load)
    gpus = gpus_needed(config, load, target)
    fits = gpus == 1
    return {
        "target": target.name,
        "memory_bytes": target.memory_bytes,
        "needs": asdict(needs) | {"total": needs.total},
        "fits": fits,
        "gpus": gpus,
        "words": _words(needs, target, gpus),
        "instead": [] if fits else list(_instead(config, load, target, gpus)),
    }


def gpus_needed(config: LlamaConfig, load: Load, target: Target) -> int | None:
    """The fewest GPUs over which the layers can be spread, a run of them on each; None: more than 8 would be needed, or than there are layers."""
    counts = range(1, min(MOST_GPUS, config.num_hidden_layers) + 1)
    return next((count for count in counts if _largest_share(config, load, count) <= target.memory_bytes), None)


def _largest_share(config: LlamaConfig, load: Load, count: int) -> int:
    """Bytes of the fullest of several GPUs: the last, with lm_head, or the first, with the embedding."""
    needs, sizes = device_memory(config, load), weight_sizes(config, load.precision)
    if count == 1:
        return needs.total
    layers = ceil(config.num_hidden_layers / count)
    ends = max(sizes.embedding, sizes.lm_head)
    return layers * sizes.layer + ends + sizes.rotary + needs.kv_cache * layers // config.num_hidden_layers + needs.activations + needs.reserved


def _words(needs: DeviceMemory, target: Target, gpus: int | None) -> str:
    sizes = {"weights": needs.weights, "cache": needs.kv_cache, "activations": needs.activations, "runtime": needs.reserved}
    parts = " + ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items())
    verdict = {1: "fits", None: f"needs more than {MOST_GPUS} of them"}.get(gpus, f"needs {gpus} of them, in parts")
    return f"{target.name}, {gigabytes(target.memory_bytes)}: {verdict}: {parts} = {gigabytes(needs.total)}"


def _instead(config: LlamaConfig, load: Load, target: Target, gpus: int | None) -> Iterator[str]:
    """What would fit one GPU, each change alone; then more GPUs."""
    smaller = [other for other in OTHERS if weight_sizes(config, other).total < weight_sizes(config, load.precision).total]
    yield from (f"--precision {other}" for other in smaller if _fits_one(config, replace(load, precision=other), target))
    if batch := next((rows for rows in range(load.batch - 1, 0, -1) if _fits_one(config, replace(load, batch=rows), target)), None):
        yield f"--max-batch {batch}"
    option = "--max-length" if load.kv_cache == "dynamic" else "--capacity"
    lengths = range(load.length // LEAST_LENGTH * LEAST_LENGTH, LEAST_LENGTH - 1, -LEAST_LENGTH)
    if length := next((tokens for tokens in lengths if tokens < load.length and _fits_one(config, replace(load, length=tokens), target)), None):
        yield f"{option} {length}"
    if load.kv_cache == "dynamic" and _fits_one(config, replace(load, kv_cache="static"), target):
        yield "a cache that is written in place: export --kv-cache static"
    if gpus is not None:
        yield f"{gpus} GPUs, one part each: --parts {gpus}"


def _fits_one(config: LlamaConfig, load: Load, target: Target) -> bool:
    return device_memory(config, load).total <= target.memory_bytes
