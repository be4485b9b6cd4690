"""A file that has just been written is read again before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from artifact.errors import ParityMismatch
from artifact.hashing import hash_span
from artifact.tensor_file import StoredTensor
from exporter.blocks import raw_place, read_blocks
from exporter.checkpoints import Checkpoint


def check_written(path: Path, tensors: list[StoredTensor], checkpoint: Checkpoint) -> None:
    """A file that has just been written holds the checkpoint's bytes; what was converted, the bytes that were hashed on the way.

    Raises:
        ParityMismatch: it does not.
    """
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            place = raw_place(checkpoint, tensor.name, tensor.dtype) if tensor.name in checkpoint.shapes else None
            if place is not None:
                same = same_bytes(file.fileno(), tensor.offset, read_blocks(place))
            else:
                same = hash_span(file, tensor.offset, tensor.length) == tensor.sha256
            if not same:
                hint = "the disk or the memory of this machine is at fault: give the same command again"
                raise ParityMismatch(f"{tensor.file}: {tensor.name} is not what was written", hint=hint)


def same_bytes(descriptor: int, offset: int, expected: Iterable[memoryview]) -> bool:
    """Whether the bytes from ``offset`` on are these."""
    same, buffer = True, bytearray()
    for block in expected:
        if len(buffer) != block.nbytes:
            buffer = bytearray(block.nbytes)
        same = os.preadv(descriptor, [buffer], offset) == block.nbytes and buffer == block and same
        offset += block.nbytes
    return same
