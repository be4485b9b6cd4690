"""One safetensors file: checked header, names, shapes, dtypes, and where each tensor lies.

The safetensors library parses and validates; only the length is checked by hand first, to say how many bytes a truncated file lacks.
Source: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the data).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from artifact.errors import CheckpointError
from exporter.checkpoints.file_tensor import AGAIN, FileTensor

LENGTH_BYTES = 8


@dataclass(frozen=True)
class SafetensorsFile:
    """Attributes: ``tensors`` by name; ``header_bytes`` with the 8 length bytes."""

    path: Path
    header_bytes: int
    tensors: dict[str, FileTensor]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    header_bytes, entries = _header(path)
    expected = header_bytes + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if path.stat().st_size != expected:
        raise CheckpointError(f"{path.name}: header says {expected:,} bytes, the file has {path.stat().st_size:,}", hint=AGAIN)
    try:
        with safe_open(path, framework="pt"):  # offsets, overlaps and lengths against shapes
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path.name}: not a valid safetensors file: {error}", hint=AGAIN) from error
    return SafetensorsFile(path, header_bytes, {name: _located(path, entry, header_bytes) for name, entry in entries.items()})


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
        if not LENGTH_BYTES < header_bytes <= size:
            raise CheckpointError(f"{path.name}: header needs {header_bytes:,} bytes, the file has {size:,}", hint=AGAIN)
        text = file.read(header_bytes - LENGTH_BYTES)
    try:
        entries = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
        entries.pop("__metadata__", None)
        int(sum(entry["data_offsets"][1] for entry in entries.values()))
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: the safetensors header can't be read: {error}", hint=AGAIN) from error
    return header_bytes, entries


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"{path.name}: the header names {next(n for n in names if names.count(n) > 1)!r} twice")
    return entries


def _located(path: Path, entry: dict[str, Any], header_bytes: int) -> FileTensor:
    begin, end = entry["data_offsets"]
    return FileTensor.contiguous(path, entry["dtype"], tuple(entry["shape"]), header_bytes + begin, end - begin)
