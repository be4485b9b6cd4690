"""Memory of mapped files: what has been read once need not stay resident."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def forget(values: NDArray[Any]) -> None:
    """Give back the pages behind a contiguous view of a file that is mapped for reading; who reads them again gets them from the page cache.

    Other arrays are left, and files mapped for writing: what was written into them might be lost.
    """
    base: Any = values
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not memoryview(base).readonly or not values.flags.c_contiguous:
        return
    start = _address(values) - _address(np.frombuffer(base, np.uint8))
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + values.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def _address(values: NDArray[Any]) -> int:
    found: int = values.__array_interface__["data"][0]
    return found
