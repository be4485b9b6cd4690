"""Measured kernel times that builds share: read before, merged and written after, under one lock; of one TensorRT release and one GPU.

The file's header binds it to both, and TensorRT refuses a foreign one; its name says them too, so that machines and releases may share a folder.
Polygraphy locks the same file in the same way, by a ``.lock`` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.util import LockFile

from artifact.errors import EngineError
from artifact.manifest import atomic_write

FOREIGN = "it is no timing cache of this TensorRT release and GPU"
CREATED, USED, REFUSED, NOT_SAVED = "created", "used", f"refused: {FOREIGN}", f"not saved: {FOREIGN}"


class TimingCache:
    """A timing cache of a build's configuration.

    Args:
        path: the file, there or not; None keeps no times.
        named: whether the user named it; such a file is never overwritten unless it is a timing cache that fits.
    """

    def __init__(self, path: Path | None, *, named: bool = False) -> None:
        self._path, self._named = path, named

    def attach(self, config: Any) -> str | None:
        """Give a builder configuration what the file holds, or an empty cache.

        Returns:
            ``created``, ``used`` or why it was refused; None without a file.

        Raises:
            EngineError: the user's own file is something else.
        """
        content = self._read()
        if content is not None and _set(config, content):
            return USED
        if content is not None and self._named:
            raise EngineError(f"--timing-cache {self._path}: {FOREIGN}", hint="name another file, or none; it is left as it is")
        _set(config, b"")
        if self._path is None:
            return None
        return CREATED if content is None else REFUSED

    def save(self, config: Any) -> str | None:
        """Write what was measured, with what other builds wrote meanwhile; a foreign file is replaced, unless the user named it.

        Returns:
            Why it was not saved; None where it was, or no times are kept.
        """
        measured = config.get_timing_cache()
        if self._path is None or measured is None:
            return None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with LockFile(str(self._path)):
            there = self._content()
            other = config.create_timing_cache(there) if there is not None else None
            merged = other is not None and bool(measured.combine(other, ignore_mismatch=False))  # TensorRT skips a foreign one
            if there is not None and not merged and self._named:
                return NOT_SAVED
            with atomic_write(self._path) as temporary:
                temporary.write_bytes(bytes(measured.serialize()))
        return None

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
