"""A GGUF file's header through the ``gguf`` package: plain metadata, and where each tensor lies.

The reader's memory map is dropped once the header is read; tensors are mapped one at a time later.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from artifact.errors import CheckpointError
from exporter.checkpoints.gguf_types import check_types

AGAIN = "download the file again"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: ``shape`` in PyTorch's order (GGUF stores it reversed), ``offset`` from file start and ``length`` in bytes."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    length: int


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` as plain Python values, ``tensors`` by GGUF name, and the length of all that stands before the data."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    header_bytes: int


class _BoundedReader(gguf.GGUFReader):
    """The package's reader, told how to read bytes and arrays.

    It says how many bytes are missing, and keeps an array as one view, or one per string, where the package makes an object or two of every
    number and length: 0.6 s instead of 3 s, and 120 MB less, for a vocabulary of 49,152.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray[Any, Any]:
        stored = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        end = int(offset) + int(count) * stored.itemsize
        if end > len(self.data):
            raise CheckpointError(f"the file is truncated: it needs at least {end:,} bytes and has {len(self.data):,}", hint=AGAIN)
        return np.frombuffer(self.data, stored, int(count), int(offset))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            parts: tuple[int, list[Any], list[int], list[gguf.GGUFValueType]] = super()._get_field_parts(orig_offs, raw_type)
            return parts
        start = orig_offs + 12  # type of the elements uint32, their number uint64
        kind, count = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        if kind in self.gguf_scalar_to_np:
            elements = [self._get(start, self.gguf_scalar_to_np[kind], count)]
            return 12 + elements[0].nbytes, elements, [0], [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            raise ValueError(f"an array of {kind.name} is not known")
        texts, size = self._strings(start, count)
        return 12 + size, texts, list(range(count)), [gguf.GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """UTF-8 views of ``count`` strings, each a uint64 length and its bytes; and the bytes they take together."""
        texts, offset = [], start
        for _ in range(count):
            length = int(self._get(offset, np.uint64)[0])
            texts.append(self._get(offset + 8, np.uint8, length))
            offset += 8 + length
        return texts, offset - start


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and the tensor table; no tensor is touched.

    Raises:
        CheckpointError: not a GGUF file, another byte order, truncated, duplicate names, a key of another type, or one piece of a split file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        reader = _BoundedReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}", hint=error.hint) from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise CheckpointError(f"{path.name}: not a GGUF file that can be read: {error}", hint=AGAIN) from error
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise CheckpointError(f"{path.name}: a big-endian GGUF file is not supported")
    check_types(metadata)
    if metadata.get("split.count", 1) > 1:
        pieces = metadata["split.count"]
        raise CheckpointError(f"{path.name}: one of {pieces} pieces of a split GGUF", hint="join them first: llama-gguf-split --merge")
    return GgufHeader(path, metadata, {tensor.name: _located(tensor) for tensor in reader.tensors}, int(reader.data_offset))


def _located(tensor: Any) -> GgufTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    length = math.prod(shape) // block * block_bytes
    return GgufTensor(shape, tensor.tensor_type, int(tensor.data_offset), length)
