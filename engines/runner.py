"""Run an engine on the GPU it was built for: its caches, and the hidden states between its parts, stay on the GPU.

Letters: B batch, S new tokens, P past, C capacity, K kv heads, D head_dim, E hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import Dtype
from engines import device_memory
from engines.device_cache import Feeds, FixedCache, GrowingCache
from engines.plan import Plan, PlanChain

Array = NDArray[Any]
Shape = tuple[int, ...]
BUILD_LARGER = "python cli.py build ART --max-batch ROWS --max-length POSITIONS"


class PlanSession:
    """One batch of sequences on an engine, call after call; the caches stay on the GPU until the session is closed, or its ``with`` block left.

    Args:
        plan: what to run, in one plan or in parts.
        config, dtype: the model it is.
        batch: rows, B.
        length: positions that a dynamic cache has room for, at most the plan's; a static one has the plan's capacity.

    Raises:
        EngineError: the plan's profiles admit fewer rows or positions.
    """

    def __init__(self, plan: Plan | PlanChain, config: LlamaConfig, dtype: Dtype, *, batch: int, length: int) -> None:
        rows, positions = plan.axes["prefill"][io_spec.BATCH][2], plan.capacity or plan.axes["prefill"][io_spec.TOTAL][2]
        if batch > rows or length > positions:
            raise EngineError(f"{plan.name} admits {rows} rows of {positions} positions, asked for {batch} of {length}", hint=BUILD_LARGER)
        self._plan, self._dtype, self._batch = plan, io_spec.NUMPY_DTYPES[dtype], batch
        self._room = plan.capacity or length
        self._stream = device_memory.open_stream()
        shape = (batch, config.num_key_value_heads, self._room, config.head_dim)
        self._cache = (FixedCache if plan.capacity else GrowingCache)(shape, self._dtype, config.num_hidden_layers)
        self._inputs: dict[str, Any] = {}
        self._width = config.hidden_size
        self._hidden = device_memory.allocate((batch, self._room, self._width), self._dtype, min(2, len(plan.parts) - 1))
        self._logits = device_memory.allocate((batch, 1, config.vocab_size), self._dtype)[0]
        self._names = io_spec.cache_names(config)
        self.restart()

    def restart(self) -> None:
        """Forget what the caches hold."""
        self._cache.restart(self._stream)

    def call(self, feeds: Feeds) -> Array:
        """Run new tokens.

        Args:
            feeds: every input but the caches, int64, as io_spec says.

        Returns:
            Logits of one position a row, [B, 1, V], the plan's dtype.

        Raises:
            EngineError: the caches have no room for them, their rows are not the session's, the shapes are outside the profile, or the run failed.
        """
        rows, new = feeds[io_spec.INPUT_IDS].shape
        if rows != self._batch or self._cache.end(feeds) > self._room:
            asked = f"{rows} rows up to position {self._cache.end(feeds)}"
            raise EngineError(f"{self._plan.name}: the caches hold {self._batch} rows of {self._room} positions, the call has {asked}")
        addresses = {name: self._copy(name, values) for name, values in feeds.items()}
        shapes = {name: values.shape for name, values in feeds.items()}
        for index in range(len(self._plan.parts)):
            self._run(index, "decode" if new == 1 else "prefill", addresses, shapes, (rows, new, self._width))
        self._cache.advance(new)
        return self._fetch([self._logits], self._logits.shape)[0]

    def caches(self) -> list[Array]:
        """Keys and values of each layer in turn, [B, K, P, D], or [B, K, C, D] of a static cache."""
        return self._fetch(self._cache.buffers(), self._cache.shape())

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._cache.free()
        device_memory.free(*self._inputs.values(), *self._hidden, self._logits, self._stream)
        self._inputs = {}

    def __enter__(self) -> PlanSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, index: int, profile: str, addresses: Mapping[str, int], shapes: Mapping[str, Shape], hidden: Shape) -> None:
        """One part of a call: its inputs with their shapes, where its outputs go, and off.

        A part reads the hidden state [B, S, E] that the one before wrote, and writes its own into the other of two buffers.
        """
        part = self._plan.parts[index]
        context = part.context(profile, self._stream.ptr)

        def bind(name: str, address: int, shape: Shape | None) -> None:
            if not part.has(name):
                return
            if shape is not None and not context.set_input_shape(name, shape):
                raise part.failed(f"{name} {list(shape)} is outside the {profile} profile")
            if not context.set_tensor_address(name, address):
                raise part.failed(f"{name} can't be bound")

        for name, address in addresses.items():
            bind(name, address, shapes[name])
        if part.enters:
            bind(part.enters, self._hidden[(index - 1) % 2].ptr, hidden)
        if part.leaves:
            bind(part.leaves, self._hidden[index % 2].ptr, None)
        self._cache.bind(bind, self._names)
        bind(io_spec.LOGITS, self._logits.ptr, None)
        if not context.execute_async_v3(self._stream.ptr):
            raise part.failed(f"{profile} of {hidden[1]} tokens did not run")

    def _copy(self, name: str, values: NDArray[np.int64]) -> int:
        """Bring an input to the GPU, where it has room for all positions; its address there."""
        if name not in self._inputs:
            self._inputs[name] = device_memory.allocate((self._batch, self._room), np.int64)[0]
        self._inputs[name].resize(values.shape).copy_from(np.ascontiguousarray(values, np.int64), self._stream)
        return int(self._inputs[name].ptr)

    def _fetch(self, buffers: list[Any], shape: tuple[int, ...]) -> list[Array]:
        """What the beginnings of buffers hold, on the host."""
        copies = [np.empty(shape, self._dtype) for _ in buffers]
        for buffer, host in zip(buffers, copies, strict=True):
            buffer.view(shape).copy_to(host, self._stream)
        self._stream.synchronize()
        return copies
