"""Does an engine fit its GPU: weights, caches at the largest batch and length, and what the kernels need between them; if not, what would.

Letters: B batch, S new tokens, T past and new, L layers, E hidden, F ffn, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import DTYPE_BYTES, Dtype, KvCache, cache_bytes
from artifact.room import gigabytes
from engines.cache_form import longest
from engines.profiles import LEAST_ROWS
from engines.targets import Target
from engines.weight_sizes import check_blocks, float_dtype, weight_sizes

RESERVED_BYTES = 600_000_000
"""What the CUDA context, its libraries and the runtime take of a GPU before a model is there."""
CACHE_SETS = {"dynamic": 2, "static": 1}
"""Form → sets of cache buffers: a growing cache is read from one and written to another, a static one is written in place."""
SCRATCH_BYTES = 8_000_000
"""What the GEMMs of a profile share, at any width."""
MOST_GPUS = 8
LEAST_LENGTH = 256
OTHERS = {"fp16": "--precision fp16, of an artifact that is exported with --dtype fp16", "int8": "--precision int8", "int4": "--precision int4"}
"""Precisions that are offered where a larger one does not fit, and how they are asked for."""
ONE_GPU = "this runner uses one"


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
        return float_dtype(self.precision)


def load_of(config: LlamaConfig, precision: str, kv_cache: KvCache, *, max_batch: int, max_length: int | None, capacity: int | None = None) -> Load:
    """What a build's options ask of a GPU: rows as the profiles will admit them, and the length that they end at.

    Raises:
        EngineError: a bound of the other cache form, or none where one is needed.
    """
    return Load(precision, max(max_batch, LEAST_ROWS.get(precision, 1)), longest(kv_cache, config, max_length, capacity), kv_cache)


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
        ``words``, ``instead`` [words of what would fit one GPU, each alone].
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
        "words": _words(needs, target, gpus, most_gpus(config)),
        "instead": [] if fits else list(_instead(config, load, target)),
    }


def most_gpus(config: LlamaConfig) -> int:
    """How many GPUs are looked at: each has a layer at least."""
    return min(MOST_GPUS, config.num_hidden_layers)


def gpus_needed(config: LlamaConfig, load: Load, target: Target) -> int | None:
    """The fewest GPUs over which the layers can be spread, a run of them on each; None: more than 8 would be needed, or than there are layers."""
    counts = range(1, most_gpus(config) + 1)
    return next((count for count in counts if _largest_share(config, load, count) <= target.memory_bytes), None)


def _largest_share(config: LlamaConfig, load: Load, count: int) -> int:
    """Bytes of the fullest of several GPUs: the last, with lm_head, or the first, with the embedding."""
    needs, sizes = device_memory(config, load), weight_sizes(config, load.precision)
    if count == 1:
        return needs.total
    layers = ceil(config.num_hidden_layers / count)
    ends = max(sizes.embedding, sizes.lm_head)
    return layers * sizes.layer + ends + sizes.rotary + needs.kv_cache * layers // config.num_hidden_layers + needs.activations + needs.reserved


def _words(needs: DeviceMemory, target: Target, gpus: int | None, most: int) -> str:
    sizes = {"weights": needs.weights, "cache": needs.kv_cache, "activations": needs.activations, "runtime": needs.reserved}
    parts = " + ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items())
    too_large = f"needs more than {most} of them" if most == MOST_GPUS else f"does not fit, a layer on each of {most} neither"
    verdict = {1: "fits", None: too_large}.get(gpus, f"needs {gpus} of them, in parts; {ONE_GPU}")
    return f"{target.name}, {gigabytes(target.memory_bytes)}: {verdict}: {parts} = {gigabytes(needs.total)}"


def _instead(config: LlamaConfig, load: Load, target: Target) -> Iterator[str]:
    """What would fit one GPU, each change alone, as a build would take it."""

    def fits(precision: str = load.precision, rows: int = load.batch, length: int = load.length, form: KvCache = load.kv_cache) -> bool:
        bound = {"max_length": length} if form == "dynamic" else {"max_length": None, "capacity": length}
        return device_memory(config, load_of(config, precision, form, max_batch=rows, **bound)).total <= target.memory_bytes

    size = weight_sizes(config, load.precision).total
    yield from (words for other, words in OTHERS.items() if _can_be(config, other) and weight_sizes(config, other).total < size and fits(other))
    fewer = range(load.batch - 1, LEAST_ROWS.get(load.precision, 1) - 1, -1)
    yield from (f"--max-batch {rows}" for rows in _first(fewer, lambda rows: fits(rows=rows)))
    option = "--max-length" if load.kv_cache == "dynamic" else "--capacity"
    shorter = range((load.length - 1) // LEAST_LENGTH * LEAST_LENGTH, LEAST_LENGTH - 1, -LEAST_LENGTH)
    yield from (f"{option} {tokens}" for tokens in _first(shorter, lambda tokens: fits(length=tokens)))
    if load.kv_cache == "dynamic" and fits(form="static"):
        yield "a cache that is written in place: export --kv-cache static"


def _can_be(config: LlamaConfig, precision: str) -> bool:
    """Whether the widths allow it."""
    try:
        check_blocks(config, precision)
    except EngineError:
        return False
    return True


def _first(values: Iterable[int], good: Callable[[int], bool]) -> Iterator[int]:
    """The first good one, if there is one."""
    return islice(filter(good, values), 1)
