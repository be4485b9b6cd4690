"""A checkpoint's tensor as blocks of bytes in the artifact's dtype: read, checked and converted in the memory of a few blocks.

Bytes that the checkpoint holds in the same dtype are read as they are; everything else comes through the reader's ``read_rows``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from artifact.errors import CheckpointError, ExportError
from artifact.io_spec import Dtype
from artifact.tensor_file import StoredTensor
from exporter.checkpoints import Checkpoint
from exporter.checkpoints.protocol import InFiles, Place
from exporter.trace import TORCH_DTYPES

STORED_DTYPES: dict[Dtype, str] = {"fp16": "F16", "fp32": "F32"}
RAW_BYTES = 2 << 20
"""Of a block that is copied as it lies: it stays in the processor's cache from the read to the scan, the hash and the write."""
ROW_BYTES = 8 << 20
"""Of a block of rows in float32, to be converted: a reader has work to do for each block."""
SCAN_VALUES = 1 << 16
MIN_CORRELATION = 0.999
SAMPLE = 16
"""One value of so many is squared to show that float16 keeps a block; all of them where that does not show it."""
KEPT_SQUARE = 2.0**-30
"""Mean square from which float16 keeps a block: rounding costs each value 2⁻¹¹ of itself or 2⁻²⁵, so its correlation is above 1 - 2⁻²⁰."""
_BITS: dict[torch.dtype, tuple[type[np.int16] | type[np.int32], int, int]] = {
    torch.float16: (np.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (np.int16, 0x7FFF, 0x7F80),
    torch.float32: (np.int32, 0x7FFFFFFF, 0x7F800000),
}
"""Dtype → integers of its size, the bits of the magnitude, and the smallest magnitude that is Inf or NaN."""
_TORCH_OF = {"F16": torch.float16, "F32": torch.float32}


@dataclass
class Tally:
    """What was seen of one tensor so far; judged when all of it was.

    Attributes:
        matrix: a matrix that the dtype rounds to nothing is refused; a vector may be nothing but noise.
        origin: where a value that is NaN or Inf was found.
        values: how many.
        bad: NaN and Inf before the conversion.
        overflowed: finite ones that the dtype can't hold; ``largest`` is the largest magnitude.
        source, stored, product: sums of squares before and after the conversion, and of their product; of blocks that the dtype surely keeps, of
            a sample alone, which can only lower the correlation.
    """

    name: str
    dtype: Dtype
    matrix: bool = True
    origin: str = "in the checkpoint"
    values: int = 0
    bad: int = 0
    overflowed: int = 0
    largest: float = 0.0
    source: float = 0.0
    stored: float = 0.0
    product: float = 0.0

    def add(self, rows: Tensor) -> Tensor:
        """Check one block, and convert it: [..] any float dtype → contiguous, the artifact's dtype."""
        self.values += rows.numel()
        converted = convert(rows, TORCH_DTYPES[self.dtype])
        if not_finite := count_not_finite(converted):  # NaN and Inf stay what they are
            bad = count_not_finite(rows)
            self.bad, self.overflowed = self.bad + bad, self.overflowed + not_finite - bad
            self.largest = max(self.largest, float(rows.abs().max()))
        elif converted.dtype is torch.float16 is not rows.dtype and self.matrix:
            self._compare(rows, converted)
        return converted

    def _compare(self, rows: Tensor, converted: Tensor) -> None:
        """A block of the size of usual weights is kept by float16 whatever its values are; only of another is every product summed."""
        sample = converted.view(-1)[: -(-converted.numel() // SAMPLE)].float()
        square = float(sample @ sample)
        if square >= KEPT_SQUARE * converted.numel():
            squares = (square, square, square)
        else:  # float64: the square of a small float32 is 0 in float32
            before, after = rows.double().flatten(), converted.double().flatten()
            squares = (float(before @ before), float(after @ after), float(before @ after))
        self.source, self.stored, self.product = self.source + squares[0], self.stored + squares[1], self.product + squares[2]

    def judge(self) -> None:
        """Refuse what would ruin the model silently.

        Raises:
            ExportError: NaN or Inf in the checkpoint, values beyond the dtype's range, or so small that the dtype loses them.
        """
        counted = f"of {self.values} values"
        if self.bad:
            raise ExportError(f"{self.name}: {self.bad} {counted} are NaN or Inf {self.origin}")
        if self.overflowed:
            limit = torch.finfo(TORCH_DTYPES[self.dtype]).max
            raise ExportError(
                f"{self.name}: {self.overflowed} {counted} overflow {self.dtype} (largest {self.largest:g}, limit {limit:g})",
                hint="export with --dtype fp32",
            )
        if self.matrix and self.correlation < MIN_CORRELATION:  # rounding to float16 costs 1e-7
            raise ExportError(
                f"{self.name}: {self.dtype} loses its values (correlation {self.correlation:.4f} with what they were): they are too small",
                hint="export with --dtype fp32",
            )

    @property
    def correlation(self) -> float:
        """Between the values before and after the conversion; 1 where nothing was converted."""
        if self.source == self.stored:
            return 1.0
        scale = (self.source * self.stored) ** 0.5
        return self.product / scale if scale else 0.0


def convert(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of another dtype; bfloat16 → float16 by way of float32, which is exact and takes torch 0.4 of the time."""
    wide = rows.float() if rows.dtype is torch.bfloat16 else rows
    return wide.to(dtype).contiguous()


def tensor_blocks(checkpoint: Checkpoint, tensor: StoredTensor, dtype: Dtype) -> Iterator[memoryview]:
    """Bytes of one planned tensor, block by block; a block may be overwritten when the next but one is drawn.

    Raises:
        ExportError: a value that the artifact must not hold; every value was looked at, so the counts are the tensor's.
        CheckpointError: the file ends before the tensor does.
    """
    tally = Tally(tensor.name, dtype, matrix=len(tensor.shape) > 1)
    if (place := raw_place(checkpoint, tensor.name, tensor.dtype)) is not None:
        for block in read_blocks(place):
            tally.add(torch.frombuffer(block, dtype=_TORCH_OF[place.dtype]))
            yield block
    else:
        for rows in row_blocks(checkpoint, tensor.name, tensor.shape):
            yield as_bytes(tally.add(rows))
    tally.judge()


def raw_place(checkpoint: Checkpoint, name: str, stored: str) -> Place | None:
    """Where a weight's bytes lie, if the checkpoint holds them in this dtype as they are."""
    place = checkpoint.place(name) if isinstance(checkpoint, InFiles) else None
    return place if place is not None and place.dtype == stored else None


def row_blocks(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """One weight as blocks of rows, as the reader gives them."""
    rows = max(1, ROW_BYTES // (4 * prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield checkpoint.read_rows(name, start, min(start + rows, shape[0]))


def joined_rows(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[Tensor]:
    """The rows of several weights one after the other, as a packed weight holds them."""
    for name in names:
        yield from row_blocks(checkpoint, name, checkpoint.shapes[name])


def count_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or Inf: a maximum over the bits of the magnitude, which is 20 times as fast as ``isfinite``."""
    integer, magnitude, smallest = _BITS[tensor.dtype]
    bits = tensor.contiguous().view(torch.int16 if integer is np.int16 else torch.int32).numpy().reshape(-1)
    scratch, count = np.empty(min(SCAN_VALUES, bits.size), integer), 0
    for start in range(0, bits.size, SCAN_VALUES):
        block = bits[start : start + SCAN_VALUES]
        found = np.bitwise_and(block, integer(magnitude), out=scratch[: block.size])
        if found.max(initial=0) >= smallest:
            count += int((found >= smallest).sum())
    return count


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.numpy().data.cast("B")


def read_blocks(place: Place) -> Iterator[memoryview]:
    """The bytes of a place in two buffers that take turns."""
    buffers = [memoryview(bytearray(min(RAW_BYTES, place.length))) for _ in range(2)]
    with place.path.open("rb", buffering=0) as file:
        for number, start in enumerate(range(0, place.length, RAW_BYTES)):
            block = buffers[number % 2][: min(RAW_BYTES, place.length - start)]
            if os.preadv(file.fileno(), [block], place.offset + start) != block.nbytes:
                raise CheckpointError(f"{place.path.name} ends before byte {place.offset + place.length:,}", hint="download the file again")
            yield block
