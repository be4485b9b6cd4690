"""A tensor that lies as plain numbers in a file: read by rows, with nothing of the file mapped.

Mapped pages count as resident memory for as long as they stay mapped; bytes read into a tensor are gone with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from artifact.errors import CheckpointError

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""What a weight may be: safetensors' word → torch's."""
READABLE = TORCH_DTYPES | {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
"""What can be read: those, and the integers of quantised weights."""
AGAIN = "download the file again"


@dataclass(frozen=True)
class FileTensor:
    """Where one tensor lies.

    Attributes:
        path: the file.
        dtype: safetensors' word; one that is not in ``READABLE`` can be named, not read.
        shape: of the tensor.
        offset: of its first element, in bytes from the start of the file.
        length: bytes from its first element to the end of its last.
        strides: elements from one index to the next, per axis.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    strides: tuple[int, ...]

    @classmethod
    def contiguous(cls, path: Path, dtype: str, shape: tuple[int, ...], offset: int, length: int) -> FileTensor:
        """A tensor whose elements follow each other in the order of its axes."""
        return cls(path, dtype, shape, offset, length, tuple(prod(shape[axis + 1 :]) for axis in range(len(shape))))

    @property
    def in_order(self) -> bool:
        """Whether its elements follow each other in the order of its axes."""
        return self.strides == tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as stored, in memory of their own.

        Raises:
            CheckpointError: the file has become shorter.
        """
        shape = (stop - start, *self.shape[1:])
        rows, item = torch.empty(shape, dtype=READABLE[self.dtype]), READABLE[self.dtype].itemsize
        first = self.offset + start * self.strides[0] * item
        with self.path.open("rb", buffering=0) as file:
            if self.in_order:
                self._fill(file.fileno(), rows, first)
            elif self.strides[1] == 1:  # a slice of wider rows
                for row in range(len(rows)):
                    self._fill(file.fileno(), rows[row], first + row * self.strides[0] * item)
            else:  # a transposed view: its columns are the rows that lie in the file
                columns = torch.empty(shape[::-1], dtype=rows.dtype)
                for column in range(len(columns)):
                    self._fill(file.fileno(), columns[column], first + column * self.strides[1] * item)
                rows.copy_(columns.t())
        return rows

    def _fill(self, descriptor: int, target: Tensor, offset: int) -> None:
        view = target.view(torch.uint8).numpy().data.cast("B") if target.numel() else memoryview(b"")
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{self.path.name}: the file ends at byte {offset + done:,}, within a tensor", hint=AGAIN)
            done += count


class TensorFile(Protocol):
    """A checked file of tensors; ``header_bytes`` of it stand before the data."""

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def header_bytes(self) -> int: ...  # noqa: D102

    @property
    def tensors(self) -> Mapping[str, FileTensor]: ...  # noqa: D102
