"""Key-value caches that stay on the GPU: one that grows, one that is written in place.

Letters: B batch, P past, C capacity, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.io_spec import CACHE_WRITE_INDICES, INPUT_IDS
from engines import device_memory

Bind = Callable[[str, int, tuple[int, ...] | None], None]
"""Name, address and, for an input, shape."""
CacheNames = Sequence[tuple[str, str]]
"""Of ``io_spec.cache_names``."""
Feeds = Mapping[str, NDArray[np.int64]]


class GrowingCache:
    """A dynamic cache: two sets of buffers, each for the longest sequence; a call reads one and writes the other.

    Args:
        shape: (B, K, length, D) of the longest.
        dtype: of keys and values.
        layers: how many.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: Any, layers: int) -> None:
        self._shape, self.length = shape, 0
        self._read, self._written = (device_memory.allocate(shape, dtype, 2 * layers) for _ in range(2))

    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, P, D) of what the next call reads."""
        return (*self._shape[:2], self.length, self._shape[3])

    def end(self, feeds: Feeds) -> int:
        """How many positions hold something after a call."""
        return self.length + int(feeds[INPUT_IDS].shape[1])

    def bind(self, bind: Bind, names: CacheNames) -> None:
        """Give a call its buffers."""
        for (past, present), read, written in zip(names, self._read, self._written, strict=True):
            bind(past, read.ptr, self.shape())
            bind(present, written.ptr, None)

    def advance(self, new: int) -> None:
        """What was written is read next."""
        self._read, self._written = self._written, self._read
        self.length += new

    def restart(self, stream: Any) -> None:
        """Forget everything."""
        self.length = 0

    def buffers(self) -> list[Any]:
        """Keys and values of each layer in turn, (B, K, P, D) each from the start of its buffer."""
        return self._read

    def free(self) -> None:
        """Give the GPU's memory back."""
        device_memory.free(*self._read, *self._written)


class FixedCache:
    """A static cache: one set of buffers, written in place; zeros at the start, because what is masked is multiplied by 0.

    Args:
        shape: (B, K, C, D).
        dtype: of keys and values.
        layers: how many.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: Any, layers: int) -> None:
        self._shape, self._zeros = shape, np.zeros(shape, dtype)
        self._buffers = device_memory.allocate(shape, dtype, 2 * layers)

    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, C, D)."""
        return self._shape

    def end(self, feeds: Feeds) -> int:
        """One past the last slot that a call writes."""
        return int(feeds[CACHE_WRITE_INDICES].max()) + int(feeds[INPUT_IDS].shape[1])

    def bind(self, bind: Bind, names: CacheNames) -> None:
        """Give a call its buffers: past and present are one."""
        for (past, present), buffer in zip(names, self._buffers, strict=True):
            bind(past, buffer.ptr, self._shape)
            bind(present, buffer.ptr, None)

    def advance(self, new: int) -> None:
        """Nothing moves."""

    def restart(self, stream: Any) -> None:
        """Zeros everywhere."""
        for buffer in self._buffers:
            buffer.copy_from(self._zeros, stream)
        stream.synchronize()

    def buffers(self) -> list[Any]:
        """Keys and values of each layer in turn, (B, K, C, D)."""
        return self._buffers

    def free(self) -> None:
        """Give the GPU's memory back."""
        device_memory.free(*self._buffers)
