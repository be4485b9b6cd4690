"""A file that is written in one pass while its bytes are hashed: the caller makes a block, one thread hashes it, another writes what is collected.

Past the page cache where the file system allows it (O_DIRECT): copying 13B's 26 GB through the cache would push everything else out of it, and costs
the processor no less than the hash does (0.20 against 0.16 s/GiB).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

CHUNK_BYTES, CHUNKS = 8 << 20, 3
"""What is written at once, from page-aligned memory, and how many such pieces take turns."""
ALIGNMENT = 4096


class HashedFile:
    """A new file; use as a context manager. Blocks are taken in order; a block must not change until the next one is written or ``wait`` returns."""

    def __init__(self, path: Path) -> None:
        self.descriptor = _open(path)
        self.hasher, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.chunks = cycle([_Chunk() for _ in range(CHUNKS)])
        self.chunk, self.filled, self.end = next(self.chunks), 0, 0
        self.hashing: Future[None] | None = None

    def write(self, block: memoryview, update: Callable[[memoryview], Any] | None = None) -> None:
        """Append a block, and give it to ``update`` in another thread."""
        self.wait()
        block = block.cast("B")
        self.hashing = self.hasher.submit(update, block) if update is not None else None
        while block:
            taken = min(block.nbytes, CHUNK_BYTES - self.filled)
            self.chunk.memory[self.filled : self.filled + taken] = block[:taken]
            self.filled, block = self.filled + taken, block[taken:]
            if self.filled == CHUNK_BYTES:
                self._send()

    def wait(self) -> None:
        """Until the last block is hashed."""
        if self.hashing is not None:
            self.hashing.result()

    def _send(self) -> None:
        """Give the collected bytes to the writing thread, and take the chunk that was written longest ago."""
        whole = -(-self.filled // ALIGNMENT) * ALIGNMENT  # the last ones are written with what lies behind them, which is cut off again
        self.chunk.writing = self.writer.submit(_write_all, self.descriptor, self.chunk.memory[:whole], self.end)
        self.end, self.filled, self.chunk = self.end + self.filled, 0, next(self.chunks)
        self.chunk.finish()

    def _close(self) -> None:
        self._send()
        for _ in range(CHUNKS):
            next(self.chunks).finish()
        os.ftruncate(self.descriptor, self.end)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._close()
        finally:
            self.hasher.shutdown()
            self.writer.shutdown()
            os.close(self.descriptor)


class _Chunk:
    """Page-aligned memory, and the write that it waits for."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        self.writing: Future[None] | None = None

    def finish(self) -> None:
        if self.writing is not None:
            self.writing.result()


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # tmpfs and some network file systems: through the cache, then
            raise
        return os.open(path, flags, 0o666)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """What can't be written directly (cut short by a full disk or a limit, and so no longer aligned) goes through the cache, or is refused there."""
    while data:
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise
            continue
        data, offset = data[written:], offset + written


def _leave_direct(descriptor: int) -> bool:
    """Write through the cache from now on; whether it was not so before."""
    flags, direct = fcntl.fcntl(descriptor, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
