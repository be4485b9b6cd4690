"""Write safetensors files as a stream: the header first, then one tensor at a time, each with its SHA-256.

The safetensors library writes whole dictionaries from memory and sorts them; here the order is ours (q·k·v and gate·up side by side), only one
tensor is held, and the data starts on a page, so that ONNX external data can point straight into the file. Reading is the library's.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError

PAGE = 4096
ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1}
CHECKSUMS = "weights/checksums.json"


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
    """Write one file; ``data`` yields each tensor's bytes in planned order and is drawn one at a time.

    Returns:
        The planned tensors with their checksums.

    Raises:
        ArtifactError: a tensor has another length than planned.
    """
    written = []
    with path.open("wb") as file:
        file.write(header)
        for tensor, piece in zip(planned, data, strict=True):
            if piece.nbytes != tensor.length:
                raise ArtifactError(f"{tensor.file}: {tensor.name} has {piece.nbytes} bytes, planned were {tensor.length}")
            file.write(piece)
            written.append(StoredTensor(**asdict(tensor) | {"shape": tensor.shape, "sha256": hashlib.sha256(piece).hexdigest()}))
    return written


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
