"""One file that ``torch.save`` wrote: which tensors it holds and where each lies, found without running or mapping anything of it.

A torch file is a zip archive: ``data.pkl`` describes the tensors, and each storage is an uncompressed record. torch's own restricted unpickler
(``weights_only``) reads the description onto the ``meta`` device; what it says is then checked against the archive's directory.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints.file_tensor import AGAIN, FileTensor

WORDS = {
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"},
    **{torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"},
}
"""torch's dtype → safetensors' word; others keep torch's own name and are refused by it."""
LITTLE = b"little"
ZIP = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and the lengths of name and extra field that stand before a record's bytes."""
SAFE = "take the safetensors file of the model instead, or have whoever made it save plain tensors: torch.save(model.state_dict(), FILE)"
RESAVE = "python -c \"import torch; torch.save(torch.load('FILE', weights_only=True), 'FILE')\""
CONTAINERS = ("state_dict", "model")
"""Keys under which training code keeps the weights beside other things."""


@dataclass(frozen=True)
class TorchFile:
    """Attributes: ``tensors`` by name; ``header_bytes`` up to the first storage: the description of all of them."""

    path: Path
    header_bytes: int
    tensors: dict[str, FileTensor]


def open_torch(path: Path) -> TorchFile:
    """Read and check the description.

    Raises:
        CheckpointError: not a torch zip file, truncated, damaged, a pickle that runs code, or tensors that lie outside of their storage.
    """
    path = path.absolute()
    records = _records(path)
    tensors = {name: _located(path, name, tensor, records) for name, tensor in _description(path).items()}
    return TorchFile(path, min(records, default=0), tensors)


def _records(path: Path) -> dict[int, int]:
    """Offset of the first byte → length, for every uncompressed record that holds a storage."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, it is {'a folder' if path.is_dir() else 'none'}", hint=AGAIN)
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            raise CheckpointError(f"{path.name}: {_what_else(path)}", hint=f"download it again, or save it in today's format: {RESAVE}")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = archive.infolist()
            orders = [info for info in infos if info.filename.endswith("/byteorder")]
            if any(info.file_size != len(LITTLE) or archive.read(info) != LITTLE for info in orders):
                raise CheckpointError(f"{path.name}: written on a big-endian machine; expected little-endian", hint=RESAVE)
            stored = [info for info in infos if "/data/" in info.filename and info.compress_type == zipfile.ZIP_STORED]
            return {_data_offset(file, info): info.file_size for info in stored if info.file_size}
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, OSError, NotImplementedError, EOFError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path.name}: truncated or damaged ({size:,} bytes, and no zip directory at its end: {error})", hint=AGAIN) from error


def _data_offset(file: Any, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    if signature != ZIP:
        raise ValueError(f"no record at byte {info.header_offset}")
    return int(info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes)


def _description(path: Path) -> dict[str, Tensor]:
    """Name → tensor on the ``meta`` device."""
    loaded: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations that an old file sets off say nothing to its reader
            loaded = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path.name}: {_unsafe(str(error))}", hint=SAFE) from error
    except Exception as error:  # torch raises whatever the pickle's opcodes run into
        raise CheckpointError(f"{path.name}: not a torch file that can be read: {_first_line(error)}", hint=AGAIN) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path.name}: holds a {type(loaded).__name__}; expected tensors by name", hint=SAFE)
    if not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        loaded = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), loaded)
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {name!r} is a {type(tensor).__name__}; expected tensors by name", hint=SAFE)
    return dict(loaded)


def _located(path: Path, name: str, tensor: Tensor, records: Mapping[int, int]) -> FileTensor:
    """Where the tensor lies; the description is a stranger's, so every number of it is checked."""
    if tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(f"{path.name}: tensor {name} is stored with a negative or conjugate bit, not as its values", hint=SAFE)
    word = WORDS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    begin = int(tensor.storage_offset())
    first, last = begin * tensor.itemsize, (begin + span) * tensor.itemsize
    held = records.get(start, 0) if start is not None else 0
    if tensor.numel() and not 0 <= first < last <= min(held, storage.nbytes()):
        raise CheckpointError(f"{path.name}: tensor {name} needs {last:,} bytes of its storage, which holds {held:,}", hint=AGAIN)
    where = FileTensor(path, word, tuple(tensor.shape), (start or 0) + first, last - first, tuple(tensor.stride()))
    if tensor.is_contiguous():
        return FileTensor.contiguous(path, word, where.shape, where.offset, where.length)
    if tensor.ndim != 2 or 1 not in tensor.stride() or 0 in tensor.stride():
        raise CheckpointError(f"{path.name}: tensor {name} is a view with strides {list(tensor.stride())}; expected rows or columns", hint=SAFE)
    return where


def _unsafe(message: str) -> str:
    found = re.search(r"(?:GLOBAL|global|class|function)\s+`?([\w.]+\.[\w.]+)", message)
    if "GLOBAL" in message or "global" in message:
        return f"its pickle would run code ({found[1] if found else 'unknown'}); refused, and nothing of it was run"
    return f"its pickle is more than plain tensors; refused, and nothing of it was run: {message.splitlines()[0][:200]}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _what_else(path: Path) -> str:
    if zipfile.is_zipfile(path):
        return "a zip archive with something before it"
    with path.open("rb") as file:
        start = file.read(32)
    if start[:1] == b"\x80":
        return "a pickle or torch's file format from before version 1.6, which can't be read in pieces"
    return "not a torch file"
