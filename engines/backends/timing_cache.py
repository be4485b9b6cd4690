"""Measured kernel times that builds share: read before, merged and written after, under one lock; of one TensorRT release and one GPU.

The file's header binds it to both, and TensorRT refuses a foreign one; its name says them too, so that machines and releases may share a folder.
Polygraphy locks the same file in the same way, by a ``.lock`` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.util import LockFile

from artifact.manifest import atomic_write

CREATED, USED, REFUSED = "created", "used", "refused: it is no timing cache of this TensorRT release and GPU"


class TimingCache:
    """A timing cache of a build's configuration.

    Args:
        path: the file, there or not; None keeps no times.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def attach(self, config: Any) -> str | None:
        """Give a builder configuration what the file holds, or an empty cache.

        Returns:
            ``created``, ``used`` or why it was refused; None without a file.
        """
        content = self._read()
        if content is not None and _set(config, content):
            return USED
        _set(config, b"")
        if self._path is None:
            return None
        return CREATED if content is None else REFUSED

    def save(self, config: Any) -> None:
        """Write what was measured, with what other builds wrote meanwhile; a refused file is replaced."""
        measured = config.get_timing_cache()
        if self._path is None or measured is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with LockFile(str(self._path)):
            there = self._content()
            other = config.create_timing_cache(there) if there is not None else None
            if other is not None:
                measured.combine(other, ignore_mismatch=False)  # TensorRT skips a foreign one
            with atomic_write(self._path) as temporary:
                temporary.write_bytes(bytes(measured.serialize()))

    def _read(self) -> bytes | None:
        if self._path is None or not self._path.is_file():
            return None
        with LockFile(str(self._path)):
            return self._content()

    def _content(self) -> bytes | None:
        assert self._path is not None
        return self._path.read_bytes() if self._path.is_file() else None


def _set(config: Any, content: bytes) -> bool:
    """Whether TensorRT takes it."""
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))
