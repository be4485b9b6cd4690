"""Write safetensors files as a stream: the header first, then the tensors in blocks, each tensor with its hash.

The safetensors library writes whole dictionaries from memory and sorts them; here the order is ours (q·k·v and gate·up side by side), only one
block is held, and the data starts on a page, so that ONNX external data can point straight into the file. Reading is the library's.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from artifact.errors import ArtifactError, ParityMismatch
from artifact.hashed_file import HashedFile
from artifact.hashing import tensor_digest

PAGE = 4096
PROBE_BYTES = 4096
ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}
CHECKSUMS = "weights/checksums.json"
WeightsMode = Literal["copy", "reference", "none"]
"""What an artifact holds of its weights: a copy of its own, the checkpoint's files themselves, or the graph alone."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
        file: path relative to the artifact folder.
        dtype: safetensors' name, ``F16``, ``F32``, ``I8`` or ``U8``.
        offset: of the first byte, from the start of the file.
        length: in bytes.
        blake3: hash of those bytes; empty while they are only planned.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    blake3: str = ""


def plan_tensors(
    file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[StoredTensor]]:
    """Lay tensors out in the order given, without gaps.

    Args:
        file: path relative to the artifact folder.
        tensors: name → (dtype, shape).
        metadata: words of the header, beside those that say who can read the file.

    Returns:
        The file's first bytes up to the data, and where each tensor will lie.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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
    """Write one file in one pass, each tensor hashed on the way; its first bytes are read back.

    Args:
        path: the file.
        header: its first bytes.
        planned: its tensors in order.
        data: their bytes in that order, in blocks of any size within one tensor. A block may be overwritten when the next but one is drawn.

    Returns:
        The planned tensors with their checksums.

    Raises:
        ArtifactError: a tensor has another length than planned.
        ParityMismatch: the file does not give back what was written.
    """
    blocks = iter(data)
    with HashedFile(path) as file:
        file.write(memoryview(header))
        hashes_and_probes = [_write_one(file, tensor, blocks) for tensor in planned]
    if next(blocks, None) is not None:
        raise ArtifactError(f"{path.name}: more data than the {len(planned)} tensors that were planned")
    _check_places(path, planned, [probe for _, probe in hashes_and_probes])
    return [replace(tensor, blake3=digest) for tensor, (digest, _) in zip(planned, hashes_and_probes, strict=True)]


def _write_one(file: HashedFile, tensor: StoredTensor, blocks: Iterator[memoryview]) -> tuple[str, bytes]:
    """The hash of a tensor's bytes, and the first of them."""
    digest, length, probe = tensor_digest(), 0, b""
    while length < tensor.length:
        block = next(blocks, None)
        length += block.nbytes if block is not None else 0
        if block is None or length > tensor.length:
            raise ArtifactError(f"{tensor.file}: {tensor.name} has {length} bytes, planned were {tensor.length}")
        probe = probe or bytes(block.cast("B")[:PROBE_BYTES])
        file.write(block, digest.update)
    file.wait()
    return digest.hexdigest(), probe


def _check_places(path: Path, planned: list[StoredTensor], probes: list[bytes]) -> None:
    """Each tensor begins where it was planned: read from the disk, for what was written went past the cache."""
    with path.open("rb", buffering=0) as file:
        for tensor, probe in zip(planned, probes, strict=True):
            if os.pread(file.fileno(), len(probe), tensor.offset) != probe:
                hint = "the disk or the memory of this machine is at fault: give the same command again"
                raise ParityMismatch(f"{tensor.file}: {tensor.name} is not what was written", hint=hint)


def checksums_json(tensors: Iterable[StoredTensor]) -> str:
    """The text of a checksums file: tensor name → where it lies and its hash."""
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
