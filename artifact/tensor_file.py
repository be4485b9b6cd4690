"""Write safetensors files as a stream: the header first, then the tensors in blocks, each tensor with its SHA-256.

The safetensors library writes whole dictionaries from memory and sorts them; here the order is ours (q·k·v and gate·up side by side), only one
block is held, and the data starts on a page, so that ONNX external data can point straight into the file. Reading is the library's.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

from artifact.errors import ArtifactError

PAGE = 4096
ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1}
CHECKSUMS = "weights/checksums.json"
FLUSH_BYTES = 64 << 20
"""How much is written before the disk is set to work on it."""
WeightsMode = Literal["copy", "reference", "none"]
"""What an artifact holds of its weights: a copy of its own, the checkpoint's files themselves, or the graph alone."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
        file: path relative to the artifact folder.
        dtype: safetensors' name, ``F16``, ``F32`` or ``I8``.
        offset: of the first byte, from the start of the file.
        length: in bytes.
        sha256: of those bytes; empty while they are only planned.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    sha256: str = ""


def plan_tensors(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[StoredTensor]]:
    """Lay tensors out in the order given, without gaps.

    Args:
        file: path relative to the artifact folder.
        tensors: name → (dtype, shape).

    Returns:
        The file's first bytes up to the data, and where each tensor will lie.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, spans = 0, {}
    for name, (dtype, shape) in tensors.items():
        length = prod(shape) * ITEM_BYTES[dtype]
        spans[name] = (position, length)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text + b" " * (-(len(text) + 8) % PAGE)
    start = 8 + len(padded)
    stored = [StoredTensor(name, file, *tensors[name], offset=start + at, length=length) for name, (at, length) in spans.items()]
    return len(padded).to_bytes(8, "little") + padded, stored


def write_tensors(path: Path, header: bytes, planned: list[StoredTensor], data: Iterable[memoryview]) -> list[StoredTensor]:
    """Write one file while a second thread hashes it and a third sets the disk to work, so that the last sync is short.

    Args:
        path: the file.
        header: its first bytes.
        planned: its tensors in order.
        data: their bytes in that order, in blocks of any size within one tensor. A block may be overwritten when the next but one is drawn.

    Returns:
        The planned tensors with their checksums.

    Raises:
        ArtifactError: a tensor has another length than planned.
    """
    blocks = iter(data)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=2) as pool:
        stream = _HashedStream(file, pool)
        stream.write(memoryview(header))
        written = [replace(tensor, sha256=_write_one(stream, tensor, blocks)) for tensor in planned]
        stream.flush()
    if next(blocks, None) is not None:
        raise ArtifactError(f"{path.name}: more data than the {len(planned)} tensors that were planned")
    return written


def _write_one(stream: _HashedStream, tensor: StoredTensor, blocks: Iterator[memoryview]) -> str:
    digest, length = hashlib.sha256(), 0
    while length < tensor.length:
        block = next(blocks, None)
        length += block.nbytes if block is not None else 0
        if block is None or length > tensor.length:
            raise ArtifactError(f"{tensor.file}: {tensor.name} has {length} bytes, planned were {tensor.length}")
        stream.write(block, digest)
    stream.wait()
    return digest.hexdigest()


class _HashedStream:
    """A file whose blocks are hashed while they are written and while the next one is made."""

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self.file, self.pool, self.dirty = file, pool, 0
        self.hashing: Future[None] | None = None
        self.flushing: Future[None] | None = None

    def write(self, block: memoryview, digest: Any = None) -> None:
        self.wait()
        if digest is not None:
            self.hashing = self.pool.submit(digest.update, block)
        rest = block.cast("B")
        while rest:
            rest = rest[self.file.write(rest) :]
        self.dirty += block.nbytes
        if self.dirty >= FLUSH_BYTES and (self.flushing is None or self.flushing.done()):
            self.flush()
            self.flushing, self.dirty = self.pool.submit(os.fsync, self.file.fileno()), 0

    def flush(self) -> None:
        """Until the disk has done what it was set to; a full disk may show only here."""
        if self.flushing is not None:
            self.flushing.result()

    def wait(self) -> None:
        """Until the last block is hashed."""
        if self.hashing is not None:
            self.hashing.result()


def checksums_json(tensors: Iterable[StoredTensor]) -> str:
    """The text of a checksums file: tensor name → where it lies and its SHA-256."""
    return json.dumps({tensor.name: {key: value for key, value in asdict(tensor).items() if key != "name"} for tensor in tensors}, indent=1) + "\n"


def read_checksums(artifact: Path, file: str = CHECKSUMS) -> dict[str, StoredTensor]:
    """Read a checksums file of an artifact.

    Raises:
        ArtifactError: it is not there, or not readable.
    """
    try:
        entries = json.loads((artifact / file).read_text(encoding="utf-8"))
        return {name: StoredTensor(name, **entry | {"shape": tuple(entry["shape"])}) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{artifact} has no {file}", hint=f"python cli.py export --checkpoint SRC --out {artifact}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{artifact / file} can't be read: {error}", hint=f"python cli.py export --checkpoint SRC --out {artifact} --force"
        ) from error
