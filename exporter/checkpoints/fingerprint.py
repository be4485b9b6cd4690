"""A cheap identity of a checkpoint: which model it is, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SAMPLE_BYTES = 4096


def state_of(paths: Iterable[Path]) -> str:
    """sha256 over name, size and modification time of files: whether they may have changed since they were read, at no cost.

    The fingerprint says which checkpoint this is, wherever it lies; the state, whether an export of it is still up to date.
    """
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def fingerprint_files(config: bytes, files: Iterable[tuple[Path, int, list[tuple[int, int]]]]) -> str:
    """sha256 over the config and, per file, its header, its size and 4 KiB from the middle of every tensor.

    Sizes and headers alone would not tell a chat model from its base: both have the same shapes.

    Args:
        config: the bytes that say what the config is.
        files: path, header length, and (offset, length) in bytes of every tensor, from file start.
    """
    digest = hashlib.sha256(config)
    for path, header_bytes, spans in files:
        with path.open("rb") as file:
            digest.update(b"%d %d\n" % (path.stat().st_size, header_bytes))
            digest.update(file.read(header_bytes))
            for offset, length in spans:
                file.seek(offset + max(0, length - SAMPLE_BYTES) // 2)
                digest.update(file.read(min(length, SAMPLE_BYTES)))
    return digest.hexdigest()
